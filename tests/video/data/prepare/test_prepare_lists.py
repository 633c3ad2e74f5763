"""Lists of the paper's authors, of LAVIS and of COCO's form become the one format."""

import pytest
from annotation_files import held, kinds, touch, write

from tokenmix_ops.video.data.prepare import prepare


@pytest.fixture
def videos(tmp_path):
    (tmp_path / "videos").mkdir()
    return tmp_path / "videos"


LISTS = {
    "the authors', for training": (
        [{"video": "video1", "caption": "a"}, {"video": "video1", "caption": "b"}],
        {"video1": ["a", "b"]},
    ),
    "the authors', for evaluation": (
        [{"video": "video6968", "caption": ["a", "b"], "video_id": 6968}],
        {"video6968": ["a", "b"]},
    ),
    "the authors', for training retrieval": (
        [{"image": "video1", "image_id": "video1", "caption": "a"}],
        {"video1": ["a"]},
    ),
    "the authors', for evaluating retrieval": (
        [{"image": "video9770", "caption": ["a person"]}],
        {"video9770": ["a person"]},
    ),
    "LAVIS's": (
        [
            {"video": "video0.mp4", "caption": "a", "image_id": 0},
            {"video": "video0.mp4", "caption": "b", "image_id": "video0"},
            {"video": "c.webm", "caption": ["d"], "image_id": 1},
        ],
        {"video0": ["a", "b"], "c": ["d"]},
    ),
    "COCO's": (
        {
            "annotations": [
                {"image_id": 12, "id": 1, "caption": "a"},
                {"image_id": 3, "id": 2, "caption": "b"},
                {"image_id": 12, "id": 3, "caption": "c"},
                {"image_id": 44, "id": 3, "caption": "d"},
            ],
            "images": [{"id": 3}, {"id": 12}, {"id": 44}],
        },
        {"video3": ["b"], "video12": ["a", "c"], "44": ["d"]},
    ),
    "COCO's with files": (
        {
            "annotations": [{"image_id": 7, "id": 1, "caption": "a"}],
            "images": [{"id": 7, "file_name": "video12.mp4"}],
        },
        {"video12": ["a"]},
    ),
    "COCO's by name": ({"annotations": [{"image_id": "x", "caption": "a"}]}, {"x": ["a"]}),
    "COCO's with numbers as strings": (
        {
            "annotations": [
                {"image_id": "12", "caption": "a"},
                {"image_id": 12, "caption": "b"},
                {"image_id": 3, "caption": "c"},
                {"image_id": "03", "caption": "d"},
            ],
            "images": [{"id": 12}, {"id": "3"}, {"id": "03"}],
        },
        {"video12": ["a", "b"], "video3": ["c"], "03": ["d"]},
    ),
    "named by image_id": (
        [{"image_id": "video3", "caption": "a"}, {"image_id": "video3", "caption": "b", "id": 4}],
        {"video3": ["a", "b"]},
    ),
    "in folders": (
        [
            {"video": "sub/video1.mp4", "caption": "a"},
            {"video": "./sub//video1", "caption": "b"},
            {"video": "other/video1.mp4", "caption": "c"},
        ],
        {"sub/video1": ["a", "b"], "other/video1": ["c"]},
    ),
    "pictures": (
        [{"image": "val2014/COCO_1.jpg", "caption": "a"}],
        {"val2014/COCO_1": ["a"]},
    ),
}


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("case", LISTS)
def test_lists(tmp_path, videos, case, split):
    content, wanted = LISTS[case]
    touch(videos, "video3.mp4", "video12.mp4", "mv89_33_44.mp4")
    path = write(tmp_path / "a", {"mine.json": content}) / "mine.json"
    prepared = prepare("lists", [], videos, tmp_path, splits={split: path})
    assert {v.video_id: list(v.captions) for v in prepared.videos} == wanted
    assert {v.split for v in prepared.videos} == {split}
    assert kinds(prepared) == []
    assert held(prepared) == {split: (len(wanted), sum(map(len, wanted.values())), None)}


def test_a_number_that_several_videos_have_is_none_of_theirs(tmp_path, videos):
    touch(videos, "c5.mp4", "c05.mp4", "c6.mp4")
    train = [{"video": "c6", "caption": "c"}]
    truth = {"annotations": [{"image_id": i, "caption": "a"} for i in (5, 6)]}
    folder = write(tmp_path / "a", {"train.json": train, "val.json": truth})
    splits = {"val": folder / "val.json", "train": folder / "train.json"}
    prepared = prepare("lists", [], videos, tmp_path, splits=splits)
    assert [(v.video_id, v.split) for v in prepared.videos] == [("5", "val"), ("c6", "val")]
    assert [(p.kind, p.what) for p in prepared.problems] == [
        (
            "in two splits",
            f"video 'c6' in train is kept only for val, in {folder / 'val.json'}, annotations[1]",
        ),
        (
            "missing video",
            "video '5' is not in the videos' folder, expected at 5.mp4; "
            "several videos have its number: c05, c5",
        ),
    ]


def test_a_number_in_a_name_is_an_id_only_by_a_visible_convention(tmp_path, videos):
    truth = {"annotations": [{"image_id": 46, "caption": "a"}]}
    splits = {"test": write(tmp_path / "a", {"a.json": truth}) / "a.json"}
    touch(videos, "mv89psg6zh4_33_46.mp4")
    prepared = prepare("lists", [], videos, tmp_path, splits=splits)
    assert [(v.video_id, v.video) for v in prepared.videos] == [("46", "videos/46.mp4")]
    assert [p.kind for p in prepared.problems] == ["missing video"]
    touch(videos, "clip46.mp4")
    prepared = prepare("lists", [], videos, tmp_path, splits=splits)
    assert prepared.videos[0].video == "videos/clip46.mp4"
    touch(videos, "video1.mp4")
    prepared = prepare("lists", [], videos, tmp_path, splits=splits)
    assert prepared.problems[0].what.endswith(
        "46.mp4; its number is ambiguous, because names there start with 'clip', 'video'"
    )
    touch(videos, "46.mp4")
    prepared = prepare("lists", [], videos, tmp_path, splits=splits)
    assert (prepared.videos[0].video, prepared.problems) == ("videos/46.mp4", ())


def listed_and_found(tmp_path, videos, **splits):
    """What is prepared of lists of names by split, each with a caption of its own."""
    files = {
        split: [{"video": name, "caption": f"of {split}"} for name in names]
        for split, names in splits.items()
    }
    folder = write(tmp_path / "a", {f"{split}.json": rows for split, rows in files.items()})
    paths = {split: folder / f"{split}.json" for split in splits}
    return prepare("lists", [], videos, videos, splits=paths)


def test_a_path_is_looked_for_before_a_name(tmp_path, videos):
    touch(videos, "a.mp4", "sub/a.avi", "deep/er/b.mkv", "frames/c/0.jpg")
    names = ["sub/a.mp4", "a.mp4", "sub/b.mp4", "frames/c", "sub/gone.jpg", "./x/c"]
    prepared = listed_and_found(tmp_path, videos, train=names)
    # Two are listed by the name c, so that "x/c" is not taken for the one in another folder.
    assert {v.video_id: v.video for v in prepared.videos} == {
        "sub/a": "sub/a.avi",
        "a": "a.mp4",
        "sub/b": "deep/er/b.mkv",
        "frames/c": "frames/c",
        "sub/gone": "sub/gone.mp4",
        "x/c": "x/c.mp4",
    }
    assert [(p.kind, p.what) for p in prepared.problems if p.kind != "ambiguous video"] == [
        (
            "missing video",
            "video 'sub/gone' is not in the videos' folder, expected at sub/gone.mp4",
        ),
        (
            "missing video",
            "video 'x/c' is not in the videos' folder, expected at x/c.mp4; "
            "frames/c has its name, but other listed videos have that name too",
        ),
    ]


def test_two_ids_of_one_file_are_one_video(tmp_path, videos):
    touch(videos, "sub/a.mp4", "sub/b.mp4")
    prepared = listed_and_found(
        tmp_path, videos, train=["sub/a.mp4", "b", "sub/b"], test=["c", "a.mp4"]
    )
    assert [(v.video_id, v.split, v.captions) for v in prepared.videos] == [
        ("b", "train", ("of train",)),
        ("c", "test", ("of test",)),
        ("a", "test", ("of test",)),
    ]
    assert kinds(prepared) == ["duplicate", "in two splits"]


def test_pictures_of_coco_are_expected_as_videos(tmp_path, videos):
    truth = {
        "images": [{"id": 1, "file_name": "val2014/COCO_1.jpg"}, {"id": 2, "file_name": "2.PNG"}],
        "annotations": [{"image_id": i, "caption": "a"} for i in ("1", 2)],
    }
    path = write(tmp_path / "a", {"a.json": truth}) / "a.json"
    prepared = prepare("lists", [], touch(videos, "2.mp4"), videos, splits={"test": path})
    assert [(v.video_id, v.video) for v in prepared.videos] == [
        ("val2014/COCO_1", "val2014/COCO_1.mp4"),
        ("2", "2.mp4"),
    ]
    assert [p.kind for p in prepared.problems] == ["missing video"]


def test_flaws_of_lists(tmp_path, videos):
    names = [{"video": "a", "caption": ["x", ""]}, {"video": "a", "caption": ["y"]}]
    truth = {
        "images": [{"id": "a"}, {"id": "b"}, {"id": "b"}],
        "annotations": [
            {"image_id": "a", "caption": "of another split"},
            {"image_id": "b", "caption": "b"},
            {"image_id": "c", "caption": "whose?"},
        ],
    }
    folder = write(tmp_path / "annotations", {"a.json": names, "b.json": truth})
    splits = {"train": folder / "a.json", "test": folder / "b.json"}
    prepared = prepare("lists", [], touch(videos, "a.mp4", "b.mp4"), splits=splits)
    wanted = ["empty caption", "duplicate", "in two splits", "duplicate", "unknown video"]
    assert kinds(prepared) == wanted
    assert [(v.video_id, v.split, v.captions) for v in prepared.videos] == [
        ("a", "test", ("of another split",)),
        ("b", "test", ("b",)),
    ]


def test_a_video_of_two_splits_is_left_to_the_later_with_its_captions(tmp_path, videos):
    files = {
        "a.json": [{"video": "a", "caption": "x"}],
        "b.json": [{"video": "a.mp4", "caption": "y"}, {"video": "b", "caption": "z"}],
    }
    folder = write(tmp_path / "annotations", files)
    splits = {"val": folder / "b.json", "train": folder / "a.json"}
    prepared = prepare("lists", [], videos, splits=splits)
    assert [(v.video_id, v.split, v.captions) for v in prepared.videos] == [
        ("a", "val", ("y",)),
        ("b", "val", ("z",)),
    ]
    assert kinds(prepared) == ["in two splits"]

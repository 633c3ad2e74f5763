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
}


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("case", LISTS)
def test_lists(tmp_path, videos, case, split):
    content, wanted = LISTS[case]
    touch(videos, "video3.mp4", "video12.mp4", "44.mp4", "other44.mp4")
    path = write(tmp_path / "a", {"mine.json": content}) / "mine.json"
    prepared = prepare("lists", [], videos, tmp_path, splits={split: path})
    assert {v.video_id: list(v.captions) for v in prepared.videos} == wanted
    assert {v.split for v in prepared.videos} == {split}
    assert kinds(prepared) == []
    assert held(prepared) == {split: (len(wanted), sum(map(len, wanted.values())), None)}


def test_a_number_that_several_videos_have_is_none_of_theirs(tmp_path, videos):
    touch(videos, "a_5.mp4", "b_05.mp4", "c6.mp4")
    train = [{"video": "c6", "caption": "c"}]
    truth = {"annotations": [{"image_id": i, "caption": "a"} for i in (5, 6)]}
    folder = write(tmp_path / "a", {"train.json": train, "val.json": truth})
    splits = {"val": folder / "val.json", "train": folder / "train.json"}
    prepared = prepare("lists", [], videos, tmp_path, splits=splits)
    assert [(v.video_id, v.split) for v in prepared.videos] == [("c6", "train"), ("5", "val")]
    assert [(p.kind, p.what) for p in prepared.problems] == [
        (
            "missing video",
            "video '5' is not in the videos' folder, for one as 5.mp4; "
            "several have its number: a_5, b_05",
        ),
        ("duplicate", "video 'c6' is listed already, for train"),
    ]


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
    assert kinds(prepared) == ["empty caption", "duplicate", *["duplicate"] * 2, "unknown video"]
    assert [(v.video_id, v.captions) for v in prepared.videos] == [("a", ("x",)), ("b", ("b",))]


def test_a_video_of_two_splits_stays_in_the_first_with_its_captions(tmp_path, videos):
    files = {
        "a.json": [{"video": "a", "caption": "x"}],
        "b.json": [{"video": "a.mp4", "caption": "y"}, {"video": "b", "caption": "z"}],
    }
    folder = write(tmp_path / "annotations", files)
    splits = {"val": folder / "b.json", "train": folder / "a.json"}
    prepared = prepare("lists", [], videos, splits=splits)
    assert [(v.video_id, v.split, v.captions) for v in prepared.videos] == [
        ("a", "train", ("x",)),
        ("b", "val", ("z",)),
    ]
    assert kinds(prepared) == ["duplicate"]

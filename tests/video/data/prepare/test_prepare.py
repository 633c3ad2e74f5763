"""Every data set's files become the one format; what is wrong with them is listed."""

import json
import os
import pickle

import pytest
from annotation_files import (
    FILM,
    LSMDC,
    LSMDC_WANTED,
    MSRVTT,
    MSRVTT_LISTS,
    MSRVTT_PARTS,
    MSRVTT_WANTED,
    MSVD_LISTS,
    MSVD_TEXT,
    MSVD_TOKENS,
    MSVD_WANTED,
    OTHER_FILM,
    TESTED,
    VATEX,
    VATEX_WANTED,
    held,
    kinds,
    lsmdc_line,
    msrvtt_sentence,
    msrvtt_video,
    touch,
    write,
)
from hypothesis import given
from hypothesis import strategies as st

from tokenmix_ops.video.data.manifest import (
    Video,
    missing,
    read_manifest,
    summary,
    write_manifest,
)
from tokenmix_ops.video.data.prepare import DATASETS, prepare


@pytest.fixture
def videos(tmp_path):
    (tmp_path / "videos").mkdir()
    return tmp_path / "videos"


# The protocol is that of Python 2, whose strings are bytes.
PYTHON2 = b"(dp0\nS'c_1_2'\np1\n(lp2\n(lp3\nS'a'\np4\naS'man'\np5\naS'cooks'\np6\naas."
PYTHON2_ACCENT = PYTHON2.replace(b"S'cooks'", rb"S'caf\xc3\xa9'")
PYTHON2_RAW = PYTHON2.replace(b"S'cooks'", b"S'caf\xc3\xa9'")
PYTHON2_BINARY = b"\x80\x02}q\x00U\x05c_1_2q\x01]q\x02]q\x03(U\x01aU\x05caf\xc3\xa9eas."

FORMS = {
    "msrvtt": ("msrvtt", {"MSRVTT_data.json": MSRVTT}, {}, MSRVTT_WANTED),
    "msrvtt in parts": ("msrvtt", MSRVTT_PARTS, {}, MSRVTT_WANTED),
    "msrvtt whole and in parts": (
        "msrvtt",
        {**dict.fromkeys(MSRVTT_PARTS, "not read"), "MSRVTT_data.json": MSRVTT},
        {},
        MSRVTT_WANTED,
    ),
    "msrvtt 9k": (
        "msrvtt",
        MSRVTT_LISTS,
        {"task": "retrieval"},
        {
            **TESTED,
            "video0": MSRVTT_WANTED["video0"],
            "video1": ("train", ["a cat, they say"]),
        },
    ),
    "msrvtt 7k": (
        "msrvtt",
        MSRVTT_LISTS,
        {"task": "retrieval", "training_list": "7k"},
        {**TESTED, "video3": MSRVTT_WANTED["video3"]},
    ),
    "msrvtt 1k-A alone": (
        "msrvtt",
        {"MSRVTT_JSFUSION_test.csv": MSRVTT_LISTS["MSRVTT_JSFUSION_test.csv"]},
        {"task": "retrieval"},
        TESTED,
    ),
    "msvd": ("msvd", {**MSVD_LISTS, "AllVideoDescriptions.txt": MSVD_TEXT}, {}, MSVD_WANTED),
    "msvd, one list": (
        "msvd",
        {"val_list.txt": MSVD_LISTS["val_list.txt"], "AllVideoDescriptions.txt": MSVD_TEXT},
        {},
        {"c_1_2": MSVD_WANTED["c_1_2"]},
    ),
    **{
        f"msvd, pickle {protocol}": (
            "msvd",
            {**MSVD_LISTS, "raw-captions.pkl": pickle.dumps(MSVD_TOKENS, protocol)},
            {},
            MSVD_WANTED,
        )
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "msvd, Python 2's pickle": (
        "msvd",
        {"val_list.txt": "c_1_2", "raw-captions.pkl": PYTHON2},
        {},
        {"c_1_2": ("val", ["a man cooks"])},
    ),
    **{
        f"msvd, Python 2's pickle, {how}": (
            "msvd",
            {"val_list.txt": "c_1_2", "raw-captions.pkl": content},
            {},
            {"c_1_2": ("val", ["a man caf\u00e9"])},
        )
        for how, content in {"escaped": PYTHON2_ACCENT, "as it is": PYTHON2_RAW}.items()
    },
    "msvd, Python 2's binary pickle": (
        "msvd",
        {"val_list.txt": "c_1_2", "raw-captions.pkl": PYTHON2_BINARY},
        {},
        {"c_1_2": ("val", ["a caf\u00e9"])},
    ),
    "vatex": ("vatex", VATEX, {}, VATEX_WANTED),
    "lsmdc": ("lsmdc", LSMDC, {}, LSMDC_WANTED),
}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_becomes_the_one_format(tmp_path, videos, form, mark):
    dataset, files, options, wanted = FORMS[form]
    folder = write(tmp_path / "annotations", files, mark)
    prepared = prepare(dataset, [folder], videos, tmp_path, **options)
    assert {v.video_id: (v.split, list(v.captions)) for v in prepared.videos} == wanted
    assert kinds(prepared) == []
    assert summary(prepared.problems).startswith(f"{len(wanted)} missing video")
    assert all((v.start, v.end) == (None, None) for v in prepared.videos)
    path = write_manifest(tmp_path / "videos.jsonl", prepared.videos)
    assert read_manifest(path, strict=True).videos == prepared.videos
    named = [folder / name for name in files]
    assert prepare(dataset, named, videos, tmp_path, **options) == prepared


def test_spans_of_videos_cut_and_uncut(tmp_path, videos):
    folder = write(tmp_path / "annotations", VATEX)
    cut, uncut = "G9zN5TTuGO4_000179_000189", "a_b-c_d_e_f_000000_000010"
    touch(videos, f"{cut}.mp4", "G9zN5TTuGO4.mp4", "deep/er/a_b-c_d_e_f.MKV", "x-/0.jpg")
    prepared = prepare("vatex", [folder], videos, tmp_path)
    found = {v.video_id: (v.video, v.start, v.end) for v in prepared.videos}
    assert found[cut] == (f"videos/{cut}.mp4", None, None)
    assert found[uncut] == ("videos/deep/er/a_b-c_d_e_f.MKV", 0.0, 10.0)
    # Images have no clock, so the span could not be found in them.
    assert found["x-_000005_000015"] == ("videos/x-_000005_000015.mp4", None, None)
    assert [p.what for p in prepared.problems if "x-" in p.what] == [
        "video 'x-_000005_000015' is not in the videos' folder, expected at x-_000005_000015.mp4; "
        "x- is a folder of images, without timestamps to find the span"
    ]
    (videos / f"{cut}.mp4").unlink()
    prepared = prepare("vatex", [folder], videos, tmp_path)
    assert prepared.videos[0] == Video(
        "videos/G9zN5TTuGO4.mp4", cut, ("a", "b"), "train", 179.0, 189.0
    )


def test_msrvtt_has_times_only_where_the_video_is_uncut(tmp_path, videos):
    data = json.loads(json.dumps(MSRVTT))
    youtube = ["9lZi22qLlEo", "w4JM08PDEng", "-x_QuGTWOc", "other"]
    for video, name in zip(data["videos"], youtube, strict=True):
        video["url"] = f"https://www.youtube.com/watch?v={name}"
    data["videos"][3]["url"] = "https://example.org/other"
    folder = write(tmp_path / "annotations", {**MSRVTT_LISTS, "MSRVTT_data.json": data})
    touch(videos, "video0.mp4", *(f"{name}.mkv" for name in youtube))
    for options in ({}, {"task": "retrieval"}):
        prepared = prepare("msrvtt", folder, videos, tmp_path, **options)
        found = {v.video_id: (v.video, v.start, v.end) for v in prepared.videos}
        assert found["video0"] == ("videos/video0.mp4", None, None)
        assert found["video1"] == ("videos/w4JM08PDEng.mkv", 137.72, 149.44)
        assert found["video2"] == ("videos/-x_QuGTWOc.mkv", 137.72, 149.44)
    assert prepare("msrvtt", folder, videos, tmp_path).videos[3].video == "videos/video3.mp4"


def test_a_file_named_outright_comes_before_one_that_is_found(tmp_path, videos):
    folder = write(tmp_path / "annotations", {"MSRVTT_data.json": MSRVTT})
    other = {**MSRVTT, "videos": MSRVTT["videos"][:1]}
    write(folder / "other", {"MSRVTT_data.json": other, "annotations.json": "not read"})
    given = [folder, folder / "other" / "MSRVTT_data.json"]
    assert [video.video_id for video in prepare("msrvtt", given, videos).videos] == ["video0"]


@given(st.text("aZ0_-", min_size=1), st.integers(0, 999999), st.integers(0, 999999))
def test_a_span_is_split_from_the_right(youtube, start, end):
    span = DATASETS["vatex"]._span(f"{youtube}_{start:06d}_{end:06d}")
    assert span == ((youtube, start, end) if start < end else None)


def test_films_have_folders(tmp_path, videos):
    folder = write(tmp_path / "annotations", LSMDC)
    touch(videos, f"avi/1001_Flight/{OTHER_FILM}.avi")
    prepared = prepare("lsmdc", [folder], videos, tmp_path)
    assert {v.video_id: v.video for v in prepared.videos} == {
        FILM: f"videos/0001_American_Beauty/{FILM}.avi",
        "b": "videos/b.avi",
        OTHER_FILM: f"videos/avi/1001_Flight/{OTHER_FILM}.avi",
    }
    assert [one.missing for one in prepared.counts] == [1, 1, 0]


# What is wrong, in which data set; kinds of the problems and what stays.
FLAWS = {
    "msrvtt": (
        "msrvtt",
        {
            "x.json": {
                "videos": [
                    *MSRVTT["videos"],
                    msrvtt_video("video0", "test"),
                    msrvtt_video("video5", "holdout"),
                    msrvtt_video("video6", "train"),
                    msrvtt_video("video7", "test"),
                ],
                "sentences": [
                    *MSRVTT["sentences"],
                    msrvtt_sentence("video0", "\t"),
                    msrvtt_sentence("video5", "left out with its video"),
                    msrvtt_sentence("video99", "whose?"),
                ],
            }
        },
        {},
        [
            *("in two splits", "unknown split", "empty caption", "unknown video"),
            *["no captions"] * 2,
        ],
        ["video1", "video2", "video3", "video0", "video7"],
    ),
    "msrvtt 9k": (
        "msrvtt",
        {**MSRVTT_LISTS, "MSRVTT_train.9k.csv": "video_id\nvideo0\nvideo77\nvideo2\nvideo0\n"},
        {"task": "retrieval"},
        ["unknown video", "in two splits", "duplicate"],
        ["video2", "video9", "video0"],
    ),
    "msvd": (
        "msvd",
        {
            **MSVD_LISTS,
            "AllVideoDescriptions.txt": MSVD_TEXT + "d_1_2\nz_1_2 a\nz_1_2 b\n",
            "test_list.txt": "d_1_2\nc_1_2\nnothing_1_2\n",
        },
        {},
        ["in two splits", "empty caption", "unknown split", "no captions"],
        ["-4wsuPCjDBc_5_15", "_UqqJdpVhhE_7_10", "d_1_2", "c_1_2", "nothing_1_2"],
    ),
    "vatex": (
        "vatex",
        {
            **VATEX,
            "vatex_validation_v1.0.json": [
                {"videoID": "plain", "enCap": ["", "d"]},
                {"videoID": "plain", "enCap": ["e"]},
            ],
        },
        {},
        ["empty caption", "duplicate", "in two splits"],
        ["G9zN5TTuGO4_000179_000189", "a_b-c_d_e_f_000000_000010", "plain"],
    ),
    "lsmdc": (
        "lsmdc",
        {
            "LSMDC16_annos_training.csv": lsmdc_line(FILM, "He runs.") * 2
            + "a\tb\n"
            + lsmdc_line("c", " "),
            "LSMDC16_annos_val.csv": lsmdc_line(FILM, "She runs."),
        },
        {},
        ["duplicate", "short line", "empty caption", "in two splits", "no captions"],
        [FILM],
    ),
}


@pytest.mark.parametrize("case", FLAWS)
def test_flaws_are_listed_and_fatal_if_asked(tmp_path, videos, case):
    dataset, files, options, wanted, stay = FLAWS[case]
    folder = write(tmp_path / "annotations", files)
    given = [folder / name for name in files]
    touch(videos, *(f"{name}.mp4" for name in stay))
    prepared = prepare(dataset, given, videos, tmp_path, **options)
    assert [problem.kind for problem in prepared.problems] == wanted
    assert [video.video_id for video in prepared.videos] == stay
    assert all(str(folder) in problem.where for problem in prepared.problems)
    with pytest.raises(ValueError) as caught:
        prepare(dataset, given, videos, tmp_path, strict=True, **options)
    assert str(caught.value) == f"{prepared.problems[0].where}: {prepared.problems[0].what}"


# Each trains on what it tests: the videos of train and test, and the captions of the one in both.
TWICE = {
    "msrvtt": (
        {
            "MSRVTT_data.json": {
                "videos": [
                    *(msrvtt_video(f"video{i}", "train") for i in (0, 1)),
                    *(msrvtt_video(f"video{i}", "test") for i in (1, 2)),
                ],
                "sentences": [msrvtt_sentence(f"video{i}", "a") for i in (0, 1, 2)],
            }
        },
        (["video0"], ["video1", "video2"], ["a"]),
    ),
    "msvd": (
        {
            "train_list.txt": "a\nb\n",
            "val_list.txt": "c\n",
            "test_list.txt": "b\nc\n",
            "AllVideoDescriptions.txt": "a x\nb y\nc z\n",
        },
        (["a"], ["b", "c"], ["y"]),
    ),
    "vatex": (
        {
            "vatex_training_v1.0.json": [{"videoID": i, "enCap": ["of train"]} for i in "ab"],
            "vatex_public_test_english_v1.1.json": [
                {"videoID": i, "enCap": ["of test"]} for i in "bc"
            ],
        },
        (["a"], ["b", "c"], ["of test"]),
    ),
    "lsmdc": (
        {
            "LSMDC16_annos_training.csv": lsmdc_line("a", "He.") + lsmdc_line("b", "She.") * 2,
            "LSMDC16_challenge_1000_publictect.csv": lsmdc_line("b", "It.") + lsmdc_line("c", "I."),
        },
        (["a"], ["b", "c"], ["It."]),
    ),
}


@pytest.mark.parametrize("dataset", TWICE)
def test_what_is_tested_is_not_trained_on(tmp_path, videos, dataset):
    files, (train, test, captions) = TWICE[dataset]
    folder = write(tmp_path / "annotations", files)
    prepared = prepare(dataset, [folder], videos, tmp_path)
    found = {
        split: [v.video_id for v in prepared.videos if v.split == split]
        for split in ("train", "val", "test")
    }
    assert found == {"train": train, "val": [], "test": test}
    assert [list(v.captions) for v in prepared.videos if v.video_id == test[0]] == [captions]
    problems = [p for p in prepared.problems if p.kind == "in two splits"]
    assert len(problems) == (2 if dataset == "msvd" else 1)
    assert problems[0].where.startswith(str(folder / next(iter(files))))
    assert f"video {test[0]!r} in train is kept only for test, in {folder}" in problems[0].what
    assert summary(problems[:1]) == "1 video in two splits"
    assert summary(problems[:1] * 2) == "2 videos in two splits"


def test_missing_videos_are_listed_and_dropped_if_asked(tmp_path, videos):
    folder = write(tmp_path / "annotations", FORMS["msrvtt"][1])
    touch(videos, "sub/video0.webm", "video1/1.jpg", "video1/2.jpg", ".video2.mp4")
    (videos / "video3").mkdir()
    prepared = prepare("msrvtt", [folder], videos, tmp_path)
    assert {v.video_id: v.video for v in prepared.videos} == {
        "video0": "videos/sub/video0.webm",
        "video1": "videos/video1",
        "video2": "videos/video2.mp4",
        "video3": "videos/video3.mp4",
    }
    assert [one.missing for one in prepared.counts] == [1, 0, 1]
    assert [p.kind for p in prepared.problems] == ["missing video"] * 2
    kept = prepare("msrvtt", [folder], videos, tmp_path, drop_missing=True)
    assert kept.videos == prepared.videos[:2]
    assert kept.problems == prepared.problems
    assert held(kept)["test"] == (0, 0, 2990)
    path = write_manifest(tmp_path / "videos.jsonl", kept.videos)
    assert missing(read_manifest(path), "train") == []
    with pytest.raises(ValueError, match=r"videos\[2\]: video 'video2' is not in"):
        prepare("msrvtt", [folder], videos, tmp_path, strict=True)
    with pytest.raises(
        ValueError, match=r"^expected at least one usable video, got none: 4 missing videos$"
    ):
        prepare("msrvtt", [folder], folder, tmp_path, drop_missing=True)


def test_videos_of_one_name_are_listed(tmp_path, videos):
    folder = write(tmp_path / "annotations", FORMS["msrvtt"][1])
    touch(videos, "b/video0.mp4", "video0/0.png", "video0.avi", *(f"video{i}.mp4" for i in (1, 2)))
    touch(videos, "video3.mp4", "unlisted.mp4", "x/unlisted.mp4")
    prepared = prepare("msrvtt", [folder], videos, tmp_path)
    assert [(p.kind, p.what) for p in prepared.problems] == [
        (
            "ambiguous video",
            "video 'video0' exists as video0.avi, video0, b/video0.mp4; using the first",
        )
    ]
    assert prepared.videos[0].video == "videos/video0.avi"


@pytest.mark.parametrize("layout", ["beside", "inside", "above", "linked", "relative"])
def test_paths_lead_from_the_manifest_to_the_videos(tmp_path, monkeypatch, layout):
    videos = touch(tmp_path / "disk" / "videos", *(f"s/video{i}.mp4" for i in range(4)))
    root = {"beside": tmp_path / "disk", "inside": videos, "above": videos / "s"}.get(
        layout, tmp_path / "work" / "here"
    )
    root.mkdir(parents=True, exist_ok=True)
    if layout == "linked":
        (tmp_path / "link").symlink_to(root)
        root = tmp_path / "link"
    folder = write(tmp_path / "annotations", FORMS["msrvtt"][1])
    if layout == "relative":
        monkeypatch.chdir(root)
        root, videos = ".", os.path.relpath(videos)
    prepared = prepare("msrvtt", [folder], videos, root)
    path = write_manifest(os.path.join(root, "videos.jsonl"), prepared.videos)
    manifest = read_manifest(path)
    assert [missing(manifest, split) for split in ("train", "val", "test")] == [[], [], []]
    assert not any(os.path.isabs(video.video) for video in manifest.videos)


REFUSED = {
    "dataset": (("coco", []), {}, "dataset must be one of msrvtt, msvd, vatex, lsmdc, lists"),
    "task": (("msvd", []), {"task": "x"}, "task must be one of captioning, retrieval, got 'x'"),
    "list": (("msrvtt", []), {"training_list": "8k"}, "training_list must be one of 9k, 7k"),
    "list for captioning": (
        ("msrvtt", []),
        {"training_list": "9k"},
        "training_list applies only to retrieval on msrvtt",
    ),
    "lists without files": (("lists", []), {}, r"lists takes one file per split \(train, val"),
    "lists with a file": (("lists", ["x.json"]), {"splits": {"val": "x"}}, "and no other files"),
    "a split": (
        ("lists", []),
        {"splits": {"dev": "x"}},
        "splits must be among train, val, test, got 'dev'",
    ),
    "splits": (
        ("msvd", []),
        {"splits": {"val": "x"}},
        "files by split are for lists; msvd recognises",
    ),
    "nothing": (
        ("vatex", []),
        {},
        r"expected one of vatex_training_v1\.0\.json, .*, got no file or",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_asked_is_refused(videos, case):
    arguments, options, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        prepare(*arguments, videos, **options)


def test_progress_says_what_is_done(tmp_path, videos):
    folder = write(tmp_path / "annotations", FORMS["msrvtt"][1])
    touch(videos, *(f"{i}.mp4" for i in range(2001)))
    said = []
    prepare("msrvtt", [folder], videos, progress=lambda *event: said.append(event))
    assert said == [
        ("reading annotations", 0),
        *[("looking for videos", count) for count in (0, 1000, 2000)],
    ]

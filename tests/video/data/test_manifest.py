"""A manifest is read as it was written; what cannot be is named by file and line."""

import json
import re

import pytest
from counting import steps
from hypothesis import given
from hypothesis import strategies as st

from tokenmix_ops.video.data.manifest import (
    SPLITS,
    Manifest,
    Problem,
    Video,
    missing,
    read_manifest,
    summary,
    write_manifest,
)

GOOD = {"video": "a.mp4", "video_id": "a", "captions": ["a dog runs"], "split": "train"}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_a_manifest_written_by_hand(tmp_path):
    path = tmp_path / "videos.jsonl"
    other = {"video": "folder/b", "video_id": "b", "captions": [], "split": "test"}
    path.write_text(lines({**GOOD, "start": 1, "end": 2.5, "category": 3}, other))
    manifest = read_manifest(path)
    assert manifest == Manifest(
        (
            Video("a.mp4", "a", ("a dog runs",), "train", 1, 2.5),
            Video("folder/b", "b", (), "test", None, None),
        ),
        tmp_path,
    )
    assert manifest.of_split("test") == [manifest.videos[1]]
    assert manifest.path_of(manifest.videos[1]) == tmp_path / "folder" / "b"
    elsewhere = read_manifest(path, tmp_path / "media")
    assert elsewhere.path_of(manifest.videos[0]) == tmp_path / "media" / "a.mp4"
    with pytest.raises(ValueError, match=r"split is 'val', but .* with videos are: train, test$"):
        manifest.of_split("val")


def test_marks_of_other_systems_are_accepted(tmp_path):
    path = tmp_path / "videos.jsonl"
    text = lines({**GOOD, "captions": ["ein Café\u2028"]}) + "\n" + lines({**GOOD, "video_id": "b"})
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert [video.video_id for video in read_manifest(path).videos] == ["a", "b"]
    assert read_manifest(path).videos[0].captions == ("ein Café\u2028",)
    path.write_text(lines(GOOD).rstrip("\n"))
    assert len(read_manifest(path).videos) == 1


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
WORDS = TEXT.filter(str.strip)
SPANS = st.none() | st.tuples(st.floats(0, 1e6), st.floats(1e-3, 1e6)).map(
    lambda span: (span[0], span[0] + span[1])
)


@given(
    st.lists(
        st.tuples(WORDS, WORDS, st.lists(WORDS, min_size=1), st.sampled_from(SPLITS), SPANS),
        unique_by=lambda fields: fields[1],
    )
)
def test_what_is_written_is_read(tmp_path_factory, fields):
    videos = tuple(
        Video(video, name, tuple(captions), split, *(span or ()))
        for video, name, captions, split, span in fields
    )
    path = tmp_path_factory.mktemp("m") / "videos.jsonl"
    assert write_manifest(path, iter(videos)) == path
    assert read_manifest(path).videos == videos
    assert [p.name for p in path.parent.iterdir()] == ["videos.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_manifest(tmp_path / "videos.jsonl", [Video("a", "a", ("x",), "train")])
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"videos\.jsonl: expected unique video_ids, got 'b' twice"
    ):
        write_manifest(path, [Video("a", "b", ("x",), "train")] * 2)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


HOSTILE = {
    "no JSON": ("{oh", r"is not JSON: Expecting"),
    "no object": ("[1]", r"must be a JSON object, got \[1\]"),
    "deep": ("[" * 100_000, r"is not JSON"),
    "half a line": (lines(GOOD)[:30], r"is not JSON"),
    "missing": ('{"video": "a", "captions": []}', r"lacks video_id, split"),
    "blank path": ({**GOOD, "video": " "}, r"video must be a non-blank string, got ' '"),
    "NUL": ({**GOOD, "video": "a\0.mp4"}, r"video must be a non-blank string"),
    "surrogate": ({**GOOD, "video_id": "\ud800"}, r"video_id must be a non-blank string"),
    "number": ({**GOOD, "video_id": 7}, r"video_id must be a non-blank string, got 7"),
    "bare caption": ({**GOOD, "captions": "dog"}, r"captions must be a list of strings, got 'dog'"),
    "caption": ({**GOOD, "captions": [1]}, r"captions must be a list of strings, got \(1,\)"),
    "split's type": ({**GOOD, "split": ["train"]}, r"split must be one of"),
    "start": ({**GOOD, "start": -1}, r"start must be at least 0 seconds, got -1"),
    "a flag": ({**GOOD, "start": True}, r"start must be at least 0 seconds"),
    "NaN": ({**GOOD, "end": float("nan")}, r"end must be at least 0 seconds, got nan"),
    "endless": ({**GOOD, "end": float("inf")}, r"end must be at least 0 seconds"),
    "a string": ({**GOOD, "end": "3"}, r"end must be at least 0 seconds, got '3'"),
    "order": ({**GOOD, "start": 3, "end": 3}, r"end must be above start = 3, got 3"),
    "end": ({**GOOD, "end": 0}, r"end must be above start = 0, got 0"),
    "an unknown split's span": ({**GOOD, "split": "x", "end": 0}, r"end must be above start"),
    "nothing said": ({**GOOD, "captions": [], "video": ""}, r"video must be a non-blank string"),
}


def three_lines(tmp_path, line):
    path = tmp_path / "videos.jsonl"
    line = line if isinstance(line, str) else json.dumps(line)
    path.write_text(lines({**GOOD, "video_id": "first"}) + "\n" + line + "\n" + lines(GOOD))
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_errors_name_file_and_line(tmp_path, case):
    line, reason = HOSTILE[case]
    path = three_lines(tmp_path, line)
    for strict in (False, True):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line 3: {reason}") as e:
            read_manifest(path, strict=strict)
        assert len(str(e.value)) < 400


OTHER = {**GOOD, "video_id": "b"}
# The line, the captions that are left of it, and the kinds and texts of its problems.
PROBLEMS = {
    "no captions": (
        {**OTHER, "captions": []},
        None,
        [("no captions", "video_id 'b': a training video needs captions")],
    ),
    "blank caption": (
        {**OTHER, "captions": ["", "a", "\t"]},
        ("a",),
        [
            ("empty caption", "video_id 'b': caption 0 is blank"),
            ("empty caption", "video_id 'b': caption 2 is blank"),
        ],
    ),
    "only blank": (
        {**OTHER, "captions": [" "]},
        None,
        [
            ("empty caption", "video_id 'b': caption 0 is blank"),
            ("no captions", "video_id 'b': a training video needs captions"),
        ],
    ),
    "only blank, for testing": (
        {**OTHER, "split": "test", "captions": [" "]},
        (),
        [("empty caption", "video_id 'b': caption 0 is blank")],
    ),
    "split": (
        {**OTHER, "split": "validate"},
        None,
        [
            (
                "unknown split",
                "video_id 'b': split must be one of train, val, test, got 'validate'",
            )
        ],
    ),
    "twice": (
        {**OTHER, "video_id": "first", "captions": ["another"]},
        None,
        [("duplicate", "video_id 'first' already appears in line 1")],
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_are_listed_and_fatal_if_asked(tmp_path, case):
    line, captions, found = PROBLEMS[case]
    path = three_lines(tmp_path, line)
    manifest = read_manifest(path)
    kept = {video.video_id: video.captions for video in manifest.videos}
    wanted = {"first": ("a dog runs",), "b": captions, "a": ("a dog runs",)}
    assert kept == {name: texts for name, texts in wanted.items() if texts is not None}
    assert manifest.problems == tuple(Problem(kind, "line 3", what) for kind, what in found)
    first = re.escape(f"{path}, line 3: {found[0][1]}")
    with pytest.raises(ValueError, match=rf"^{first}$"):
        read_manifest(path, strict=True)


def test_a_line_left_out_does_not_take_the_place_of_another(tmp_path):
    path = tmp_path / "videos.jsonl"
    path.write_text(lines({**GOOD, "split": "dev"}, GOOD, GOOD))
    manifest = read_manifest(path)
    assert [video.split for video in manifest.videos] == ["train"]
    assert [(problem.kind, problem.where) for problem in manifest.problems] == [
        ("unknown split", "line 1"),
        ("duplicate", "line 3"),
    ]
    assert manifest.problems[1].what == "video_id 'a' already appears in line 2"


def test_a_summary_counts_by_kind():
    kinds = ["duplicate", "no captions", "duplicate", "empty caption", "no captions"]
    problems = [Problem(kind, "line 1", "") for kind in kinds]
    assert summary(problems) == "2 duplicates, 2 videos without captions, 1 empty caption"
    assert summary(problems[1:2] * 1234) == "1,234 videos without captions"
    assert summary(problems[1:2]) == "1 video without captions"
    assert summary([]) == ""


def test_work_grows_with_the_number_of_lines_alone(tmp_path):
    """Also where every line has a problem."""
    path = tmp_path / "videos.jsonl"
    taken = []
    for count in (200, 1600):
        with path.open("w") as file:
            for i in range(count // 2):
                one = {**GOOD, "video_id": f"video{i}"}
                file.write(lines(one, {**one, "captions": ["", "again"]}))
        found = []
        taken.append(steps(lambda: found.append(read_manifest(path))))  # noqa: B023
        (manifest,) = found
        assert len(manifest.videos) == count // 2
        assert summary(manifest.problems) == (
            f"{count // 2:,} empty captions, {count // 2:,} duplicates"
        )
    assert taken[1] < 8 * 1.2 * taken[0]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_named(tmp_path, encoding):
    path = tmp_path / "videos.jsonl"
    path.write_text(lines(GOOD).replace("dog", "caf\xe9"), encoding=encoding)
    with pytest.raises(ValueError, match=r"line 1: is not UTF-8; convert the file"):
        read_manifest(path)


@given(st.binary(max_size=200))
def test_bytes_at_random_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("m") / "videos.jsonl"
    path.write_bytes(content)
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}, line ")  # noqa: PT017
    else:
        assert manifest.videos == ()


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(OSError, match=r"none\.jsonl"):
        read_manifest(tmp_path / "none.jsonl")
    (tmp_path / "here.mp4").write_bytes(b"")
    (tmp_path / "frames").mkdir()
    path = tmp_path / "videos.jsonl"
    write_manifest(path, [Video(n, n, (), "val") for n in ("here.mp4", "frames", "gone.mp4")])
    assert [video.video for video in missing(read_manifest(path), "val")] == ["gone.mp4"]
    path.write_text("")
    with pytest.raises(ValueError, match="splits with videos are: none"):
        missing(read_manifest(path), "val")

"""``tokenmix data prepare`` as a user types it, on a world whose manifest is known."""

import json

import pytest

from tokenmix_ops.video import cli
from tokenmix_ops.video.data.manifest import read_manifest, write_manifest
from tokenmix_ops.video.data.prepare import DATASETS
from tokenmix_ops.video.data.shapes import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), 20, size=16, num_frames=2).parent


@pytest.fixture
def tokenmix(capsys):
    """(exit status, standard output, standard error) of ``tokenmix data prepare``."""

    def run(*arguments):
        status = 0
        try:
            cli.main(["data", "prepare", *map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return (1, out, err + status) if isinstance(status, str) else (status, out, err)

    return run


def test_help_has_an_example(tokenmix):
    status, out, _ = tokenmix("--help")
    assert status == 0
    assert "Example: tokenmix data prepare msrvtt" in " ".join(out.split())
    assert f"{{{','.join(DATASETS)}}}" in out


def test_the_small_world_becomes_the_manifest_it_came_with(tokenmix, world, tmp_path):
    out = tmp_path / "new" / "m.jsonl"
    status, said, err = tokenmix("msrvtt", world, "--videos", world / "videos", "--out", out)
    assert (status, err.strip()) == (0, "")
    prepared, known = read_manifest(out), read_manifest(world / "videos.jsonl")
    assert [prepared.path_of(video).resolve() for video in prepared.videos] == [
        known.path_of(video) for video in known.videos
    ]
    for name in ("video_id", "captions", "split", "start", "end"):
        assert [getattr(video, name) for video in prepared.videos] == [
            getattr(video, name) for video in known.videos
        ]
    assert "16" in said
    assert "6,513" in said
    assert said.endswith(f"{out}\n")
    assert [path.name for path in out.parent.iterdir()] == ["m.jsonl"]
    status, _, err = tokenmix("msrvtt", world, "--videos", world / "videos", "--out", out)
    assert status == 1
    assert err.strip().endswith("m.jsonl is there already: pass --force, or another --out")
    beside = world / "again.jsonl"
    tokenmix("msrvtt", world, "--videos", world / "videos", "--out", beside)
    assert beside.read_bytes() == (world / "videos.jsonl").read_bytes()


def test_another_folder_of_videos_is_suspected(tokenmix, world, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    given = ("msrvtt", world, "--videos", wrong, "--out")
    status, said, _ = tokenmix(*given, tmp_path / "m")
    assert status == 0
    assert f"None of the videos is in {wrong}: is --videos right?" in said
    status, _, err = tokenmix(*given, tmp_path / "none", "--drop-missing")
    assert status == 1
    assert "expected at least one usable video, got none: 20 missing videos" in err
    assert not (tmp_path / "none").exists()


def test_problems_are_printed_and_written(tokenmix, world, tmp_path):
    names = [f"video{i}" for i in range(5)] + [f"[bold]gone{i}" for i in range(4)]
    mine = [{"video": name, "caption": "a"} for name in names]
    (tmp_path / "mine.json").write_text(json.dumps([*mine, {"video": "video0", "caption": ""}]))
    out, listed = tmp_path / "m.jsonl", tmp_path / "m.jsonl.problems.jsonl"
    arguments = ("lists", "--videos", world / "videos", "--out", out)
    arguments += ("--train", tmp_path / "mine.json")
    status, said, _ = tokenmix(*arguments)
    assert status == 0
    assert f"1 empty caption, 4 missing videos; all in {listed}" in said
    assert "mine.json, [9]: a caption of video 'video0' is blank" in said
    assert "'[bold]gone1' is not in" in said
    assert "gone2" not in said
    problems = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [one["kind"] for one in problems] == ["empty caption", *["missing video"] * 4]
    assert len(read_manifest(out).videos) == 9

    status, said, _ = tokenmix(*arguments, "--force", "--drop-missing", "--json")
    assert status == 0
    counts = {"split": "train", "videos": 5, "captions": 5, "missing": 0, "official": None}
    assert json.loads(said) == {
        "out": str(out),
        "splits": {"train": counts},
        "problems": problems,
    }
    assert len(read_manifest(out).videos) == 5

    before = out.read_bytes()
    status, said, err = tokenmix(*arguments, "--force", "--strict")
    assert (status, said) == (1, "")
    assert "mine.json, [9]: a caption of video 'video0' is blank" in " ".join(err.split())
    assert out.read_bytes() == before

    (tmp_path / "mine.json").write_text(json.dumps(mine[:5]))
    assert tokenmix(*arguments, "--force")[0] == 0
    assert not listed.exists()


def test_a_manifest_in_the_way_is_left_alone(tokenmix, world, tmp_path):
    out = write_manifest(tmp_path / "m.jsonl", read_manifest(world / "videos.jsonl").videos)
    before = out.read_bytes()
    status, _, err = tokenmix("vatex", tmp_path, "--videos", world, "--out", out, "--force")
    assert status == 1
    assert "expected one of vatex_training_v1.0.json" in err
    assert out.read_bytes() == before

"""Videos that cannot be read are skipped, listed, and no more than allowed."""

import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from counting import steps
from experiment_runs import TASKS, experiment, losses, run
from rich.console import Console
from torch.utils.data import DataLoader

from tokenmix_ops.video.data.clips import ClipError
from tokenmix_ops.video.data.dataset import CaptionedClips, collate
from tokenmix_ops.video.data.manifest import Video, read_manifest
from tokenmix_ops.video.data.unreadable import Unreadable
from tokenmix_ops.video.experiments import running
from tokenmix_ops.video.experiments.captioning_task import CaptioningTask
from tokenmix_ops.video.experiments.configs import as_yaml
from tokenmix_ops.video.experiments.evaluating import evaluate_captions, evaluate_ranking
from tokenmix_ops.video.experiments.retrieval_task import RetrievalTask
from tokenmix_ops.video.experiments.settings import Captioning, Retrieval


def videos(count):
    return [Video(f"{i}.mp4", str(i), ("a",), "train") for i in range(count)]


@pytest.fixture
def world(experiment_folder, tmp_path):
    """A copy of the small world, to damage."""
    shutil.copytree(experiment_folder / "world", tmp_path / "world")
    return read_manifest(tmp_path / "world" / "videos.jsonl")


def damage(manifest, split, *rows):
    for row in rows:
        path = manifest.path_of(manifest.of_split(split)[row])
        path.write_bytes(b"no video " * 100)
    return {manifest.of_split(split)[row].video_id for row in rows}


def on(manifest, one, **changes):
    data = manifest.root / "videos.jsonl"
    return replace(one, videos=replace(one.videos, data=data, **changes))


def listed(path):
    # Processes that write at once may leave an empty line between two.
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def test_each_video_is_listed_once(tmp_path):
    some = videos(10)
    notes = Unreadable(tmp_path / "list.jsonl", some, 0.25)
    assert (notes.remark(), notes.reasons()) == (None, {})
    for _ in range(3):
        notes.add(some[1], ValueError("bad \n one \u2028 ü"))
    notes.add(some[2], ValueError("gone"))
    assert notes.reasons() == {"1": "bad \n one \u2028 ü", "2": "gone"}
    assert len((tmp_path / "list.jsonl").read_bytes().splitlines()) == 2
    assert (
        notes.remark() == f"2 of 10 videos could not be read (listed in {tmp_path / 'list.jsonl'})"
    )
    with pytest.raises(
        ValueError, match=r"3 of 10 .* share of 0.25 that --max-unreadable .* last error: third"
    ):
        notes.add(some[3], ValueError("third"))
    # Who comes later finds the list as it is.
    later = Unreadable(tmp_path / "list.jsonl", some, 0.25)
    with pytest.raises(ValueError, match="4 of 10"):
        later.add(some[4], ValueError("fourth"))
    wider = Unreadable(tmp_path / "list.jsonl", some, 0.5)
    wider.add(some[5], ValueError("fifth"))
    # Of other videos nothing is counted; half a line is not either, and spoils no other.
    with (tmp_path / "list.jsonl").open("a") as file:
        file.write('{"video_id": "7", "vid')
    assert wider.reasons().keys() == {"1", "2", "3", "4", "5"}
    most = Unreadable(tmp_path / "list.jsonl", some, 0.9)
    most.add(some[6], ValueError("sixth, of \udce9"))
    assert most.reasons().keys() == wider.reasons().keys() == {"1", "2", "3", "4", "5", "6"}
    assert Unreadable(tmp_path / "list.jsonl", some, 0.9).reasons() == most.reasons()
    assert Unreadable(tmp_path / "list.jsonl", some[3:5], 0.5).reasons().keys() == {"3", "4"}


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_cannot_be(tmp_path, share):
    with pytest.raises(ValueError, match="max_unreadable"):
        Unreadable(tmp_path / "list.jsonl", videos(3), share)


def test_missing_ones_count_as_well(tmp_path):
    notes = Unreadable(tmp_path / "list.jsonl", videos(8), 0.25, missing=1)
    notes.add(videos(8)[0], ValueError("bad"))
    with pytest.raises(ValueError, match=r"and 1 are missing: more than the share of 0\.25"):
        notes.add(videos(8)[1], ValueError("bad"))


def test_a_long_list_takes_no_more_work_for_each(tmp_path):
    some = videos(2000)

    def of_each(count):
        notes = Unreadable(tmp_path / str(count), some, 0.9)

        def add():
            for video in some[:count]:
                notes.add(video, ValueError("bad"))

        return steps(add) / count

    assert of_each(800) < 1.2 * of_each(100)


def add_all(path, own):
    notes = Unreadable(path, videos(100), 0.9)
    for number in own:
        notes.add(videos(100)[number], ValueError("x" * 500))


def test_processes_add_to_one_list(tmp_path):
    path = tmp_path / "list.jsonl"
    context = multiprocessing.get_context("fork")
    parts = [range(0, 30), range(20, 50), range(40, 70)]
    processes = [context.Process(target=add_all, args=(path, part)) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert Unreadable(path, videos(100), 0.9).reasons().keys() == {str(i) for i in range(70)}
    assert {record["error"] for record in listed(path)} == {"x" * 500}


def test_a_full_disk_is_told(tmp_path):
    notes = Unreadable(tmp_path / "list.jsonl", videos(3), 0.9)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="is the disk full"):
            notes.add(videos(3)[0], ValueError("bad"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "list.jsonl").stat().st_size == 10
    assert notes.reasons() == {}


def test_another_caption_stands_in_whoever_reads(world, tmp_path):
    bad = damage(world, "train", 0, 3)

    def clips(name):
        notes = Unreadable(tmp_path / name, world.of_split("train"), 0.5)
        return CaptionedClips(world, "train", num_frames=2, size=16, unreadable=notes)

    alone = clips("alone")
    items = [alone[(1, index)] for index in range(len(alone))]
    stood_in = [
        index for index, (row, _) in enumerate(alone.pairs) if alone.videos[row].video_id in bad
    ]
    for index, (item, (row, caption)) in enumerate(zip(items, alone.pairs, strict=True)):
        same = (item["video"], item["caption"]) == (row, caption)
        assert same == (index not in stood_in)
        assert alone.videos[item["video"]].video_id not in bad
        assert item["caption"] in alone.videos[item["video"]].captions
    # Not always the same one.
    assert len({items[index]["video"] for index in stood_in}) > 1
    assert alone.unreadable.reasons().keys() == bad
    for index in stood_in:
        path = str(alone.manifest.path_of(alone.videos[alone.pairs[index][0]]))
        assert any(path in error for error in alone.unreadable.reasons().values())
    keys = [[(1, index)] for index in range(len(alone))]
    loader = DataLoader(clips("workers"), batch_sampler=keys, num_workers=2, collate_fn=collate)
    for item, batch in zip(items, loader, strict=True):
        assert batch["pixels"][0].equal(item["pixels"])
        assert batch["captions"] == [item["caption"]]
    with pytest.raises(ClipError):
        CaptionedClips(world, "train", num_frames=2, size=16)[stood_in[0]]


@pytest.mark.parametrize("task", TASKS)
def test_training_skips_and_lists(world, experiment_folder, tmp_path, task):
    bad = damage(world, "train", 2)
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    missing = world.of_split("train")[5]
    world.path_of(missing).unlink()
    unseen = damage(world, "val", 1)
    one = experiment(task, experiment_folder, select_on="val", epochs=2)
    one = on(world, one, max_unreadable=0.5)
    printed = io.StringIO()
    running.run(one, tmp_path / "run", console=Console(file=printed, width=300))
    out = tmp_path / "run"
    text = printed.getvalue()
    assert (
        f"left out: 1 of 16 videos of split 'train' are not there: {world.path_of(missing)}" in text
    )
    assert "left out: 1 of 2 videos of split 'val' cannot be read" in text
    assert "1 of 15 videos could not be read" in text
    assert [record["video_id"] for record in listed(out / "unreadable.jsonl")] == list(bad)
    assert unseen.isdisjoint(bad)
    # The same again, and another number of workers, give the same.
    workers = replace(one, training=replace(one.training, workers=2))
    run(workers, tmp_path / "again")
    assert losses(tmp_path / "again") == losses(out)
    # Who is stopped on the way goes on to the same.
    with pytest.raises(KeyboardInterrupt):
        run_and_be_stopped(one, tmp_path / "half")
    run(one, tmp_path / "half", resume=True)
    assert losses(tmp_path / "half") == losses(out)


def run_and_be_stopped(one, out):
    """Runs an experiment that is told to stop after its first update."""
    kind = {Captioning: CaptioningTask, Retrieval: RetrievalTask}[type(one)]

    def after_update(self, own=kind.after_update, told=[]):  # noqa: B006
        own(self)
        if not told:
            told.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "after_update", after_update)
        run(one, out)


def test_too_many_stop_the_training(world, experiment_folder, tmp_path):
    bad = damage(world, "train", 0, 1, 2, 3)
    one = experiment("captioning", experiment_folder, epochs=3)
    for share, workers in ((0.1, 0), (0.0, 0), (0.1, 2)):
        out = tmp_path / f"run{share}{workers}"
        strict = on(world, one, max_unreadable=share)
        strict = replace(strict, training=replace(strict.training, workers=workers))
        with pytest.raises(ValueError, match=f"of 16 videos could not be read.*{share:g} that"):
            run(strict, out)
        found = {record["video_id"] for record in listed(out / "unreadable.jsonl")}
        assert len(found) >= 1 + 16 * share // 1
        assert found <= bad
    for video in world.of_split("train")[:4]:
        world.path_of(video).unlink()
    with pytest.raises(ValueError, match="4 of 16 videos of split 'train' are not there"):
        run(on(world, one), tmp_path / "missing")
    run(on(world, one, max_unreadable=0.25), tmp_path / "allowed")
    assert not (tmp_path / "allowed" / "unreadable.jsonl").exists()


def test_a_process_that_stops_ends_with_its_workers(world, experiment_folder, tmp_path):
    damage(world, "train", *range(6))
    one = on(world, experiment("captioning", experiment_folder, workers=2))
    (tmp_path / "one.yaml").write_text(as_yaml(one))
    command = (sys.executable, "-m", "tokenmix_ops.video.cli", "caption", "train")
    options = ("--config", str(tmp_path / "one.yaml"), "--out", str(tmp_path / "run"))
    ended = subprocess.run((*command, *options), capture_output=True, text=True)
    assert ended.returncode == 1
    assert "of 16 videos could not be read" in ended.stderr.splitlines()[-1]


def test_a_new_training_begins_with_no_list(world, experiment_folder, tmp_path):
    bad = damage(world, "train", 0)
    one = on(world, experiment("captioning", experiment_folder))
    out = tmp_path / "run"
    out.mkdir()
    old = [{"video_id": v.video_id, "video": v.video, "error": "old"} for v in world.videos]
    (out / "unreadable.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    run(one, out)
    assert {record["video_id"] for record in listed(out / "unreadable.jsonl")} == bad


def test_evaluations_leave_out_what_they_are_allowed_to(world, experiment_folder, capsys):
    damage(world, "test", 0)
    data = world.root / "videos.jsonl"
    scoring = dict(tokenizer="python", meteor=False)
    for evaluate, task, more in (
        (evaluate_captions, "captioning", scoring),
        (evaluate_ranking, "retrieval", {}),
    ):
        ask = dict(workers=0, batch_size=2, **more)
        model = str(experiment_folder / task)
        wanted = f"{world.of_split('test')[0].video}.*; --max-unreadable 0.1 leaves out"
        with pytest.raises(ClipError, match=wanted):
            evaluate(model, data, None, "test", **ask)
        with pytest.raises(ValueError, match="1 of 2 videos of split 'test' cannot be read"):
            evaluate(model, data, None, "test", max_unreadable=0.3, **ask)
        capsys.readouterr()
        assert evaluate(model, data, None, "test", max_unreadable=0.5, **ask) is not None
        assert "left out: 1 of 2 videos of split 'test' cannot be read" in capsys.readouterr().err

"""The videos of an experiment: problems are told, the cache changes nothing, the rate counts."""

import io
import json
import shutil
from dataclasses import replace

import pytest
from experiment_runs import FRAMES, SIZE, TASKS, experiment, losses, run
from rich.console import Console

from tokenmix_ops.video.checkpoints import save_updated
from tokenmix_ops.video.data.clips import read_clip
from tokenmix_ops.video.data.manifest import read_manifest
from tokenmix_ops.video.experiments import running
from tokenmix_ops.video.experiments.building import start
from tokenmix_ops.video.experiments.evaluating import open_model, predict_captions
from tokenmix_ops.video.experiments.settings import Captioning, Opening, Videos


def printed(one, out):
    """What a run says, and the run."""
    console = Console(file=io.StringIO(), width=300)
    running.run(one, out, console=console)
    return console.file.getvalue()


@pytest.mark.parametrize("task", TASKS)
def test_a_cache_changes_nothing_but_the_work(experiment_folder, tmp_path, task):
    one = experiment(task, experiment_folder, select_on="val", epochs=2)
    run(one, tmp_path / "without")
    cached = replace(one, videos=replace(one.videos, cache=tmp_path / "cache", cache_gib=0.01))
    text = printed(cached, tmp_path / "first")
    assert "keeps decoded frames, 0.0 of 0.01 GiB so far" in text
    files = sorted((tmp_path / "cache").rglob("*.frames"))
    # Of the training's clips all frames, of the evaluation's those that it reads.
    assert len(files) == 16 + 2
    stamps = [file.stat().st_mtime_ns for file in files]
    run(cached, tmp_path / "second")
    assert [file.stat().st_mtime_ns for file in files] == stamps
    assert losses(tmp_path / "first") == losses(tmp_path / "without")
    assert losses(tmp_path / "second") == losses(tmp_path / "without")


def test_problems_of_the_data_are_told_or_fatal(experiment_folder, tmp_path):
    shutil.copytree(experiment_folder / "world", tmp_path / "world")
    data = tmp_path / "world" / "videos.jsonl"
    lines = data.read_text().splitlines()
    odd = {**json.loads(lines[0]), "video_id": "odd", "split": "training"}
    data.write_text("\n".join([*lines, lines[0], json.dumps(odd)]) + "\n")
    one = experiment("captioning", experiment_folder, max_steps=1)
    one = replace(one, videos=replace(one.videos, data=data))
    text = printed(one, tmp_path / "run")
    assert f"{data}: 1 duplicate, 1 unknown split; tokenmix data check lists them" in text
    strict = replace(one, videos=replace(one.videos, strict=True))
    with pytest.raises(ValueError, match=f"line {len(lines) + 1}"):
        run(strict, tmp_path / "strict")


def test_a_rate_is_kept_with_the_checkpoint(experiment_folder, tmp_path):
    one = experiment("captioning", experiment_folder, max_steps=1)
    one = replace(one, videos=replace(one.videos, fps=2.0))
    run(one, tmp_path)
    best = str(tmp_path / "last.safetensors")
    assert open_model(best, Captioning())[1].videos.fps == 2.0
    with pytest.raises(ValueError, match=r"trained with --fps 2\.0, got 3\.0"):
        open_model(best, Captioning(), Opening(fps=3.0))
    whole = str(experiment_folder / "captioning")
    assert open_model(whole, Captioning())[1].videos.fps is None
    assert open_model(whole, Captioning(), Opening(fps=3.0))[1].videos.fps == 3.0


def test_a_checkpoint_without_settings_reads_as_many_frames(experiment_folder, tmp_path):
    one = experiment("captioning", experiment_folder)
    loaded = start(one, [], tmp_path)
    save_updated(tmp_path / "mine.safetensors", loaded.model, base=loaded.name)
    videos = open_model(str(tmp_path / "mine.safetensors"), Captioning())[1].videos
    assert (videos.num_frames, videos.image_size) == (FRAMES, SIZE)


def test_a_prediction_reads_at_the_rate_of_the_training(experiment_folder, tmp_path, monkeypatch):
    one = experiment("captioning", experiment_folder, max_steps=1)
    run(replace(one, videos=replace(one.videos, fps=2.0)), tmp_path)
    manifest = read_manifest(one.videos.data)
    path = manifest.path_of(manifest.videos[0])
    rates = []

    def noted(*args, fps=None, **others):
        rates.append(fps)
        return read_clip(*args, fps=fps, **others)

    monkeypatch.setattr("tokenmix_ops.video.experiments.evaluating.read_clip", noted)
    ((_, captions, error),) = predict_captions(str(tmp_path / "last.safetensors"), [path])
    assert error is None
    assert captions
    assert rates == [2.0]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_unreadable", 1.0), ("max_unreadable", -0.1), ("fps", 0.0), ("cache_gib", -1.0)],
)
def test_numbers_out_of_range(setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {value}"):
        Videos(**{setting: value})

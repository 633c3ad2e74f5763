"""Experiments with real captioners and retrievers: methods, kills, processes, accumulation."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from experiment_runs import TASKS, begin, experiment, losses, rank, run, run_and_die
from safetensors.torch import load_file
from together import free_port, run_together
from waiting import once

from tokenmix_ops.video import blip
from tokenmix_ops.video.checkpoints import describe
from tokenmix_ops.video.engine.store import Store
from tokenmix_ops.video.experiments.building import load_checkpoint, load_whole, start
from tokenmix_ops.video.experiments.configs import plain, read_experiment
from tokenmix_ops.video.experiments.retrieval_task import TextBatch
from tokenmix_ops.video.export import export
from tokenmix_ops.video.text import CaptionTokenizer
from tokenmix_ops.video.tuning import METHODS, Tuning

TRAINED = [name for name in METHODS if name != "frozen"]


@pytest.fixture(autouse=True)
def on_one_core(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_dropout(monkeypatch):
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        monkeypatch.setitem(blip.TRAINING, name, 0.0)


@pytest.mark.interfaces
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", TRAINED)
def test_every_method_trains_and_is_loaded_again(tmp_path, experiment_folder, task, method):
    one = experiment(task, experiment_folder, method=method, max_steps=2)
    figures = run(one, tmp_path)
    assert figures["updates"] == 2
    assert (figures["last"], figures["best"]) == (None, None)
    curve = losses(tmp_path)
    assert [line["update"] for line in curve] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in curve)
    assert curve[-1]["loss"] == figures["loss"]
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert read_experiment(tmp_path / "experiment.yaml") == one
    assert not (tmp_path / "best.safetensors").exists()
    description = describe(tmp_path / "last.safetensors")
    assert description.settings == plain(one)
    assert (description.task, description.model) == (task, str(experiment_folder / task))
    loaded, _ = load_checkpoint(tmp_path / "last.safetensors")
    own = dict(loaded.model.named_parameters())
    saved = load_file(tmp_path / "last.safetensors")
    assert saved.keys() == {name for name, p in own.items() if p.requires_grad}
    for name, value in saved.items():
        assert torch.equal(own[name], value), name
    assert_all_take_part(tmp_path, task, 2)


def assert_all_take_part(out, task, updates):
    """With several processes all that is trained has to, in each update."""
    moments = Store(out).read(updates)["optimizer"]
    updated = {name.partition(".")[2] for name in moments}
    assert updated - {""} == load_file(out / "last.safetensors").keys()
    assert {int(moment["step"]) for moment in moments.values()} == {updates}
    assert ("temperature" in moments) == (task == "retrieval")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", TRAINED)
def test_everything_takes_part_in_an_update(tmp_path, experiment_folder, task, method):
    tuning = {"everything": True}
    run(experiment(task, experiment_folder, method=method, tuning=tuning, max_steps=1), tmp_path)
    assert_all_take_part(tmp_path, task, 1)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_trained_moves_and_nothing_else(tmp_path, experiment_folder, task):
    run(experiment(task, experiment_folder, method="token_mixing", max_steps=2), tmp_path)
    before = load_file(experiment_folder / task / "model.safetensors")
    after = load_file(tmp_path / "last.safetensors")
    moved = {
        name.removeprefix("encoder.")
        for name, value in after.items()
        if not torch.equal(value, before[name.removeprefix("encoder.")])
    }
    assert "vision_model.encoder.layers.1.self_attn.qkv.weight" in moved
    assert not any(".layers.0." in name for name in after)
    assert not any("bert" in name or "text_encoder" in name for name in after)


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory, experiment_folder):
    """Runs that nothing interrupts, of two epochs of four updates, with what they were."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("unkilled")
    runs = {}
    for task in TASKS:
        one = experiment(task, experiment_folder, batch_size=8, epochs=2, save_every=2)
        if task == "captioning":
            one = replace(one, drop_path=0.2)
        run(one, folder / task)
        runs[task] = one, folder / task
    return runs


# The engine has its own test of every moment.
KILLS = (("update", 6), ("write", 1))


def assert_same_tensors(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name


@pytest.mark.parametrize("task", TASKS)
def test_killed_at_any_moment(tmp_path, unkilled, processes, task):
    one, whole = unkilled[task]
    started = []
    for where, number in KILLS:
        out = tmp_path / f"{where}{number}"
        process = processes.Process(target=run_and_die, args=(one, out, where, number))
        process.start()
        started.append((out, process))
    for out, process in started:
        process.join()
        assert process.exitcode == -signal.SIGKILL, out
        assert not (out / "figures.json").exists()
        run(one, out, resume=True)
        assert losses(out) == losses(whole), out
        assert (out / "figures.json").read_text() == (whole / "figures.json").read_text()
        last = "last.safetensors"
        assert_same_tensors(load_file(out / last), load_file(whole / last))
        mine, theirs = Store(out).read(8), Store(whole).read(8)
        assert_same_tensors(mine["model"], theirs["model"])
        assert not list(out.glob("state/*.part"))


EVERYTHING = {"tuning": {"everything": True}}
# Task, settings, and what two processes have besides.
JOBS = {
    "captioning": ("captioning", {}, {}),
    "retrieval": ("retrieval", {}, {}),
    "whole_retrieval": ("retrieval", EVERYTHING, {}),
    "checkpointed_retrieval": ("retrieval", {}, {"gradient_checkpointing": True}),
    "divided_captioning": ("captioning", EVERYTHING, {"fsdp": True}),
    "divided_retrieval": ("retrieval", EVERYTHING, {"fsdp": True}),
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, experiment_folder, processes):
    """Folders of what two processes did."""

    def work(out):
        listed = [
            (part_of(experiment_folder, name, batch_size=4, **besides), out / name)
            for name, (_, _, besides) in JOBS.items()
        ]
        with free_port() as port:
            run_together([processes.Process(target=rank, args=(i, port, listed)) for i in range(2)])

    return once(tmp_path_factory, "two_experiments", work)


def test_many_processes_begin_and_one_writes(tmp_path, experiment_folder, processes):
    one = experiment("captioning", experiment_folder, batch_size=2, max_steps=1)
    one = replace(one, tiny=True)
    with free_port() as port:
        run_together(
            [processes.Process(target=begin, args=(i, 3, port, one, tmp_path)) for i in range(3)]
        )
    out = tmp_path / "begun"
    assert read_experiment(out / "experiment.yaml") == one
    assert (out / "model" / "model.safetensors").exists()
    assert not list(out.glob("*.part"))
    assert [line["update"] for line in losses(out)] == [1]


def part_of(folder, name, **training):
    task, more, _ = JOBS[name]
    return experiment(task, folder, method="token_mixing", select_on="val", **more, **training)


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_agree_with_one(tmp_path, experiment_folder, no_dropout, two_processes, name):
    run(part_of(experiment_folder, name, batch_size=8), tmp_path)
    mine, theirs = losses(two_processes / name), losses(tmp_path)
    assert [line.pop("kind") for line in mine] == ["update"] * 4 + ["evaluation"]
    assert [line.pop("kind") for line in theirs] == ["update"] * 4 + ["evaluation"]
    assert [line.pop("split", None) for line in mine] == [
        line.pop("split", None) for line in theirs
    ]
    for line, wanted in zip(mine, theirs, strict=True):
        assert line.pop("tokenizer", None) == wanted.pop("tokenizer", None)
        assert line == pytest.approx(wanted, rel=1e-5)
    weights, wanted = (
        load_file(path / "last.safetensors") for path in (two_processes / name, tmp_path)
    )
    assert weights.keys() == wanted.keys()
    for parameter, value in wanted.items():
        mine, value = (without_key_bias(parameter, v) for v in (weights[parameter], value))
        torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-5, msg=parameter)


def test_two_processes_print_once(two_processes):
    """The command trains and evaluates; the first process alone says what came out."""
    printed = [json.loads(line) for line in (two_processes / "printed0").read_text().splitlines()]
    assert (two_processes / "printed1").read_text() == ""
    trained, evaluated = printed
    best = json.loads((two_processes / "command" / "figures.json").read_text())["best"]
    assert trained["best"] == best
    assert evaluated.pop("METEOR") is None
    assert evaluated.pop("tokenizer")
    assert evaluated.pop("videos") == 2
    assert evaluated == pytest.approx({name: best[name] for name in evaluated})


def without_key_bias(name, value):
    """The softmax takes no notice of it, and AdamW makes steps of its gradient's rounding."""
    if name.endswith("qkv.bias"):
        query, key, rest = value.chunk(3)
        return torch.cat([query, 0 * key, rest])
    return 0 * value if name.endswith(".key.bias") else value


def test_accumulated_batches_agree_with_one(tmp_path, experiment_folder, no_dropout):
    for folder, sizes in (("whole", (8, 1)), ("cut", (4, 2))):
        batch_size, accumulation = sizes
        one = experiment(
            "captioning", experiment_folder, batch_size=batch_size, accumulation=accumulation
        )
        run(one, tmp_path / folder)
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert len(whole) == len(cut) == 4
    for line, wanted in zip(cut, whole, strict=True):
        assert line.pop("kind") == wanted.pop("kind")
        assert line == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_gradient_checkpointing_changes_nothing(tmp_path, experiment_folder, task):
    for folder in ("kept", "again"):
        one = experiment(
            task,
            experiment_folder,
            method="full",
            max_steps=2,
            gradient_checkpointing=folder == "again",
        )
        run(one, tmp_path / folder)
    for line, wanted in zip(losses(tmp_path / "again"), losses(tmp_path / "kept"), strict=True):
        assert line.pop("kind") == wanted.pop("kind")
        assert line == pytest.approx(wanted, rel=1e-6)
    last = "last.safetensors"
    again, kept = load_file(tmp_path / "again" / last), load_file(tmp_path / "kept" / last)
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_mixed_precision_on_a_cpu(tmp_path, experiment_folder, task):
    curves = {}
    for precision in ("no", "bf16"):
        one = experiment(task, experiment_folder, precision=precision, max_steps=2, select_on="val")
        run(one, tmp_path / precision)
        curves[precision] = [line["loss"] for line in losses(tmp_path / precision)[:2]]
        for value in load_file(tmp_path / precision / "last.safetensors").values():
            assert value.dtype is torch.float32
    assert curves["bf16"] == pytest.approx(curves["no"], rel=0.05)
    assert curves["bf16"] != curves["no"]


def tiny_experiment(task, folder, **changes):
    return replace(experiment(task, folder), tiny=True, **changes)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_does_not_resume_has_a_small_model_of_its_own(tmp_path, experiment_folder, task):
    one = tiny_experiment(task, experiment_folder)
    first = start(one, ["a circle"], tmp_path)
    kept = start(one, ["a big red square"], tmp_path)
    assert kept.tokenizer.vocab_size == first.tokenizer.vocab_size
    new = start(one, ["a big red square"], tmp_path, fresh=True)
    assert new.tokenizer.encode(["big red square"], 9)[0].shape[1] == 5
    assert new.tokenizer.vocab_size > first.tokenizer.vocab_size
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # As it is, it is of its own size.
    assert load_whole(task, str(tmp_path / "model")).model.encoder.image_size == 32


def test_nothing_but_a_small_model_is_replaced_by_one(tmp_path, experiment_folder):
    home = tmp_path / "model"
    shutil.copytree(experiment_folder / "captioning", home)
    before = sorted(home.iterdir())
    one = tiny_experiment("captioning", experiment_folder)
    with pytest.raises(ValueError, match=f"{home} is no model of --tiny"):
        start(one, ["a circle"], tmp_path, fresh=True)
    assert sorted(home.iterdir()) == before


def test_a_whole_model_runs_at_the_recipes_size(experiment_folder):
    name = str(experiment_folder / "captioning")
    encoder = load_whole("captioning", name).model.encoder
    assert (encoder.image_size, encoder.num_frames) == (224, 8)
    encoder = load_whole("captioning", name, image_size=48, num_frames=3).model.encoder
    assert (encoder.image_size, encoder.num_frames) == (48, 3)


@pytest.mark.parametrize("task", TASKS)
def test_an_exported_models_mixing_is_not_lost(tmp_path, experiment_folder, task):
    one = experiment(task, experiment_folder, method="token_mixing", tuning={"mixing": "paper"})
    home = export(start(one, [], tmp_path).model, tmp_path / "whole")
    one = replace(one, model=str(home), tokenizer=str(experiment_folder / task))
    again = start(one, [], tmp_path).model.encoder
    assert [layer.self_attn.mixing.kind for layer in again.layers] == ["spatial", "paper"]
    whole = load_whole(task, str(home), tokenizer=one.tokenizer).model.encoder
    assert (whole.image_size, whole.num_frames) == (32, 2)
    for tuning in (
        Tuning("spatial"),
        Tuning("bitfit"),
        Tuning("token_mixing"),
        Tuning("token_mixing", mixing="paper", layers=(0, 1)),
    ):
        with pytest.raises(ValueError, match="--method token_mixing --mixing paper --layers 1;"):
            start(replace(one, tuning=tuning), [], tmp_path)


def test_texts_of_a_batch_are_as_long_as_any_may_be(experiment_folder):
    tokenizer = CaptionTokenizer.from_pretrained(experiment_folder / "retrieval")
    items = [{"pixels": torch.zeros(1), "video": 0, "caption": "a circle"}]
    batch = TextBatch(tokenizer, 11)(items)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (1, 11)
    assert batch["attention_mask"].sum() == 4


def test_the_epoch_chosen_is_the_best_of_the_split(tmp_path, experiment_folder):
    one = experiment("retrieval", experiment_folder, select_on="test", epochs=3, batch_size=8)
    figures = run(one, tmp_path)
    evaluations = [line for line in losses(tmp_path) if line["kind"] == "evaluation"]
    assert [line["split"] for line in evaluations] == ["test"] * 3
    best = max(evaluations, key=lambda line: line["score"])
    assert figures["best"]["update"] == best["update"]
    assert describe(tmp_path / "best.safetensors").figures["score"] == best["score"]
    assert figures["last"]["update"] == 12

"""The training engine: one curve, however it is cut, stopped or spread over processes."""

import errno
import json
import math
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from engine_toy import DIM, Stopped, ToyTask, rank, run, run_and_die, stop_after
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from together import free_port, run_together
from waiting import once, wait_until

from tokenmix_ops.video.engine import Training, loop, store
from tokenmix_ops.video.engine.placement import shard, start_accelerator
from tokenmix_ops.video.engine.progress import Progress
from tokenmix_ops.video.engine.schedule import learning_rate
from tokenmix_ops.video.engine.store import Store

CURVE = ("kind", "update", "epoch", "loss", "error", "learning_rate", "grad_norm", "score")


@pytest.fixture(autouse=True)
def on_one_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    os.environ["ACCELERATE_USE_CPU"] = "true"
    run(out, save_every=4)
    return out


def curve(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in CURVE if name in line} for line in lines]


def weights(path):
    return load_file(path)


def assert_same_run(out, reference):
    assert curve(out) == curve(reference)
    for file in ("best.safetensors", "last.safetensors"):
        mine, theirs = weights(out / file), weights(reference / file)
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(mine[name], value), name
    assert (out / "figures.json").read_text() == (reference / "figures.json").read_text()
    newest = Store(reference).updates()[-1]
    mine, theirs = Store(out).read(newest), Store(reference).read(newest)
    assert torch.equal(mine["random"][0]["cpu"], theirs["random"][0]["cpu"])
    for name, moments in theirs["optimizer"].items():
        for key, moment in moments.items():
            assert torch.equal(mine["optimizer"][name][key], moment)


@pytest.mark.interfaces
def test_a_run_leaves_a_curve_states_and_checkpoints(whole_run):
    lines = curve(whole_run)
    assert [line["update"] for line in lines if line["kind"] == "update"] == [*range(1, 13)]
    scores = [line["score"] for line in lines if line["kind"] == "evaluation"]
    assert [line["update"] for line in lines if line["kind"] == "evaluation"] == [6, 12]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    figures = json.loads((whole_run / "figures.json").read_text())
    assert figures["updates"] == 12
    assert figures["loss"] == losses[-1]
    assert figures["best"]["score"] == max(scores)
    assert figures["last"]["score"] == scores[-1]
    with safe_open(whole_run / "best.safetensors", "pt") as best:
        assert json.loads(best.metadata()["figures"]) == figures["best"]
    assert Store(whole_run).updates() == [8, 12]
    assert list(whole_run.glob("tensorboard/events*"))
    frozen = ToyTask().model.frozen.weight
    assert torch.equal(weights(whole_run / "last.safetensors")["frozen.weight"], frozen)
    assert "frozen.weight" not in Store(whole_run).read(12)["model"]


@pytest.mark.parametrize("after", [1, 3, 4, 5, 6, 7, 11, 12])
def test_resuming_goes_on_bit_for_bit(tmp_path, whole_run, after):
    task = ToyTask()
    stop_after(task, after)
    with pytest.raises(Stopped):
        run(tmp_path, task=task, save_every=4)
    run(tmp_path, task=ToyTask(seed=0), resume=True, save_every=4)
    assert_same_run(tmp_path, whole_run)


def test_a_resumed_state_holds_all_that_changes(tmp_path):
    """From other weights everywhere but in the frozen part, the rest comes from the state."""
    run(tmp_path / "whole", save_every=5)
    task = ToyTask()
    stop_after(task, 8)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", task=task, save_every=5)
    other = ToyTask(seed=3)
    for part in ("frozen", "layers.0.shared"):
        frozen = ToyTask().model.get_submodule(part).state_dict()
        other.model.get_submodule(part).load_state_dict(frozen)
    other.model.queue.fill_(float("nan"))
    run(tmp_path / "cut", task=other, resume=True, save_every=5)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_stopping_in_an_evaluation(tmp_path, whole_run):
    task = ToyTask()
    evaluate, calls = task.evaluate, []

    def second_stops(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise Stopped
        return evaluate(*arguments)

    task.evaluate = second_stops
    with pytest.raises(Stopped):
        run(tmp_path, task=task, save_every=4)
    run(tmp_path, resume=True, save_every=4)
    assert_same_run(tmp_path, whole_run)


def test_resuming_twice_with_workers(tmp_path, whole_run):
    for after in (5, 3):
        task = ToyTask()
        stop_after(task, after)
        with pytest.raises(Stopped):
            run(tmp_path, task=task, save_every=1, resume=after == 3, workers=1)
    run(tmp_path, resume=True, save_every=4)
    assert curve(tmp_path) == curve(whole_run)


def test_evaluating_does_not_change_the_training(tmp_path, whole_run):
    run(tmp_path, evaluate_every=2)
    mine, theirs = curve(tmp_path), curve(whole_run)
    assert [line for line in mine if line["kind"] == "update"] == [
        line for line in theirs if line["kind"] == "update"
    ]
    assert [line["update"] for line in mine if line["kind"] == "evaluation"] == [12]


KILLS = [
    *(("update", number) for number in (2, 9)),
    *(("write", number) for number in (1, 2, 4)),
    *(("renamed", number) for number in (1, 4, 5)),
    ("evaluation", 1),
    *(("checkpoint", number) for number in (1, 3)),
]


def test_killed_at_any_moment(tmp_path, whole_run, processes):
    started = []
    for where, number in KILLS:
        out = tmp_path / f"{where}{number}"
        arguments = (out, where, number, {"save_every": 4})
        started.append((out, processes.Process(target=run_and_die, args=arguments)))
        started[-1][1].start()
    for out, process in started:
        process.join()
        assert process.exitcode == -signal.SIGKILL, out
        run(out, resume=True, save_every=4)
        assert_same_run(out, whole_run)
        assert not list(out.glob("state/*.part"))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, processes):
    """Folders of what two processes did, each name with its settings."""
    clip = {"max_grad_norm": 0.5}
    jobs = {
        "copies": ({"batch_size": 4}, None),
        "clipped": ({"batch_size": 4, **clip}, None),
        "accumulated": ({"batch_size": 2, "accumulation": 2}, None),
        "resumed": ({"batch_size": 4, "save_every": 2}, 5),
        "in_an_evaluation": ({"batch_size": 4}, "evaluation"),
        "divided": ({"batch_size": 4, "fsdp": True, **clip}, None),
        "divided_accumulated": ({"batch_size": 2, "accumulation": 2, "fsdp": True}, None),
        "divided_resumed": ({"batch_size": 4, "fsdp": True, "save_every": 2}, 5),
        "divided_checkpointed": (
            {"batch_size": 4, "fsdp": True, "gradient_checkpointing": True},
            None,
        ),
        "checkpointed": ({"batch_size": 4, "gradient_checkpointing": True}, None),
        "divided_in_an_evaluation": ({"batch_size": 4, "fsdp": True}, "evaluation"),
        "told_to_stop": ({"batch_size": 4}, "signal"),
        "divided_told_to_stop": ({"batch_size": 4, "fsdp": True}, "signal"),
        "unreadable": ({"batch_size": 4, "save_every": 2}, "unreadable"),
        "divided_unreadable": ({"batch_size": 4, "fsdp": True, "save_every": 2}, "unreadable"),
        "of_two_minds": ({"batch_size": 4}, "other scores"),
    }

    def work(out):
        listed = [(out / name, settings, fails) for name, (settings, fails) in jobs.items()]
        with free_port() as port:
            run_together([processes.Process(target=rank, args=(i, port, listed)) for i in range(2)])

    return once(tmp_path_factory, "two_toys", work)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What one process does with the doubled batch, plain and clipped."""
    out = tmp_path_factory.mktemp("one")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    run(out / "plain", task=ToyTask(0.0, rare=False), batch_size=8)
    run(out / "clipped", task=ToyTask(0.0, rare=False), batch_size=8, max_grad_norm=0.5)
    return out


def assert_close_run(out, reference):
    mine, theirs = curve(out), curve(reference)
    assert len(mine) == len(theirs) == 8
    for line, wanted in zip(mine, theirs, strict=True):
        assert line.pop("kind") == wanted.pop("kind")
        assert line == pytest.approx(wanted, rel=1e-5)
    values = weights(reference / "last.safetensors")
    for name, value in weights(out / "last.safetensors").items():
        assert type(value) is torch.Tensor
        torch.testing.assert_close(value, values[name], rtol=1e-5, atol=1e-6)


BOTH_WAYS = (
    *("accumulated", "resumed", "checkpointed"),
    *("in_an_evaluation", "told_to_stop", "unreadable"),
)


@pytest.mark.interfaces
@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("copies", "plain"),
        ("of_two_minds", "plain"),
        ("clipped", "clipped"),
        ("divided", "clipped"),
        *((f"{start}{name}", "plain") for start in ("", "divided_") for name in BOTH_WAYS),
    ],
)
def test_two_processes_agree_with_one(two_processes, one_process, name, alone):
    assert_close_run(two_processes / name, one_process / alone)


def test_accumulation_agrees_with_one_batch(tmp_path, one_process):
    run(tmp_path, task=ToyTask(0.0, rare=False), batch_size=4, accumulation=2)
    assert_close_run(tmp_path, one_process / "plain")


def test_some_parameters_miss_some_updates(tmp_path):
    run(tmp_path, batch_size=8)
    steps = Store(tmp_path).read(6)["optimizer"]
    assert steps["head.weight"]["step"] == 6
    assert 0 < steps["rare"]["step"] < 6


def test_a_parameter_without_a_moment_yet_resumes(tmp_path):
    def runs(out, **more):
        return run(out, length=4, batch_size=4, epochs=2, **more)

    runs(tmp_path / "whole")
    assert "rare" not in Store(tmp_path / "whole").read(2)["optimizer"]
    task = ToyTask()
    stop_after(task, 2)
    with pytest.raises(Stopped):
        runs(tmp_path / "cut", task=task)
    runs(tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.interfaces
def test_gradient_checkpointing_computes_twice_and_the_same(tmp_path, whole_run):
    task = ToyTask()
    run(tmp_path, task=task, gradient_checkpointing=True)
    assert curve(tmp_path) == curve(whole_run)
    # Two forward passes in each of 12 updates; evaluations call the first layer, twice each.
    assert [layer.calls for layer in task.model.layers] == [28, 24]


@pytest.mark.interfaces
def test_mixed_precision_keeps_the_weights(tmp_path):
    task = ToyTask()
    run(tmp_path, task=task, precision="bf16", max_steps=3)
    assert {value.dtype for value in task.model.parameters()} == {torch.float32}
    run(tmp_path / "full", max_steps=3)
    mine, full = curve(tmp_path)[0]["loss"], curve(tmp_path / "full")[0]["loss"]
    assert mine != full
    assert mine == pytest.approx(full, rel=0.05)


def with_scaler(monkeypatch):
    """Has precision "no" scale losses as fp16 does on a GPU, growing every second update."""

    def start(settings, **options):
        accelerator = start_accelerator(settings, **options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024, growth_interval=2)
        return accelerator

    monkeypatch.setattr(loop, "start_accelerator", start)


def scales(out, update):
    return Store(out).read(update)["scaler"]


@pytest.mark.interfaces
def test_the_scaler_of_fp16_resumes(tmp_path, monkeypatch):
    with_scaler(monkeypatch)
    run(tmp_path / "whole", save_every=3)
    assert scales(tmp_path / "whole", 9)["_growth_tracker"] == 1
    task = ToyTask()
    stop_after(task, 5)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", task=task, save_every=3)
    run(tmp_path / "cut", resume=True, save_every=3)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    for update in (9, 12):
        assert scales(tmp_path / "cut", update) == scales(tmp_path / "whole", update)


@pytest.mark.interfaces
def test_an_overflow_that_the_scaler_handles_is_no_error(tmp_path, monkeypatch):
    with_scaler(monkeypatch)
    task = ToyTask()
    calls = []

    def overflow_once(gradient):
        calls.append(1)
        return gradient * (math.inf if len(calls) == 3 else 1)

    task.model.head.weight.register_hook(overflow_once)
    run(tmp_path, task=task, epochs=1, save_every=1)
    assert task.updates == 5
    steps = Store(tmp_path).read(6)["optimizer"]["head.weight"]["step"]
    assert steps == 5
    assert scales(tmp_path, 6)["scale"] == 1024 * 2 * 0.5 * 2


def test_max_steps_ends_with_an_evaluation(tmp_path):
    figures = run(tmp_path, max_steps=8)
    assert figures["updates"] == figures["last"]["update"] == 8
    assert figures["last"]["epoch"] == 2


def test_without_a_split_the_last_is_kept_alone(tmp_path):
    figures = run(tmp_path, select_on=None, max_steps=2)
    assert (tmp_path / "last.safetensors").exists()
    assert not (tmp_path / "best.safetensors").exists()
    assert figures["best"] is None


class FullDisk:
    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


@pytest.mark.parametrize("how", ["by PyTorch's writer", "by the system"])
def test_a_full_disk_leaves_the_last_good_state(tmp_path, whole_run, monkeypatch, how):
    saved = []

    def third_fails(state, file):
        saved.append(1)
        if len(saved) < 3:
            torch.save(state, file)
        elif how == "by the system":
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            torch.save(state, FullDisk(file, 1000))

    monkeypatch.setattr(store, "save", third_fails)
    with pytest.raises(OSError, match=r"update-00000008\.part/state\.pt could not be written: "):
        run(tmp_path, save_every=4)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert Store(tmp_path).updates() == [4, 6]
    assert not list(tmp_path.glob("state/*.part"))
    run(tmp_path, resume=True, save_every=4)
    assert_same_run(tmp_path, whole_run)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run/state could not be written: Not a directory"):
        run(tmp_path / "file" / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_update(tmp_path, whole_run, number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    task = ToyTask()
    weight = task.weight

    def weight_of(batch):
        if task.updates == 2:
            # A launcher gives it to the processes that read, too.
            readers = multiprocessing.active_children()
            assert len(readers) == 1
            for pid in (readers[0].pid, os.getpid()):
                os.kill(pid, number)
            time.sleep(0.2)
        return weight(batch)

    task.weight = weight_of
    with pytest.raises(KeyboardInterrupt, match="stopped after update 3, which is saved"):
        run(tmp_path, task=task, workers=1)
    assert Store(tmp_path).updates() == [3]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    run(tmp_path, resume=True, save_every=4)
    assert_same_run(tmp_path, whole_run)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    task = ToyTask()

    def weight_of(batch):
        os.kill(os.getpid(), signal.SIGINT)
        # Two signals that come before Python has looked at the first would count as one.
        wait_until(lambda: signal.getsignal(signal.SIGINT) is signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: False)

    task.weight = weight_of
    # What a shell starts in the background ignores the signal from the beginning.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, task=task)
    finally:
        signal.signal(signal.SIGINT, before)
    assert Store(tmp_path).updates() == []


def test_ctrl_c_in_an_evaluation_stops_at_once(tmp_path, whole_run):
    task = ToyTask()
    task.evaluate = lambda *_: (os.kill(os.getpid(), signal.SIGINT), wait_until(lambda: False))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, task=task)
    assert Store(tmp_path).updates() == [6]
    run(tmp_path, resume=True, save_every=4)
    assert_same_run(tmp_path, whole_run)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops(tmp_path, value):
    task = ToyTask()
    forward = task.model.forward

    def diverging(batch, epoch):
        losses = forward(batch, epoch)
        return losses | {"loss": losses["loss"] * (value if task.updates == 4 else 1)}

    task.model.forward = diverging
    with pytest.raises(ValueError, match=rf"^loss is {value} at update 5: "):
        run(tmp_path, task=task, save_every=1)
    assert Store(tmp_path).updates() == [3, 4]
    assert all(v.isfinite().all() for v in Store(tmp_path).read(4)["model"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    task = ToyTask()
    own = task.after_update

    def after_update():
        own()
        if task.updates == 4:
            task.model.head.bias.data[0] = math.inf

    task.after_update = after_update
    with pytest.raises(ValueError, match=r"^head\.bias has values that are not finite"):
        run(tmp_path, task=task, save_every=2)
    assert Store(tmp_path).updates() == [2]


def stopped_at(out, after=5, **settings):
    task = ToyTask()
    stop_after(task, after)
    with pytest.raises(Stopped):
        run(out, task=task, save_every=2, **settings)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "absent"])
def test_a_damaged_state_is_named_with_the_one_before(tmp_path, damage):
    stopped_at(tmp_path)
    path = tmp_path / "state" / "update-00000004" / "state.pt"
    content = bytearray(path.read_bytes())
    if damage == "absent":
        path.unlink()
    else:
        if damage == "flipped":
            weight = Store(tmp_path).read(4)["model"]["head.weight"]
            content[content.index(weight.numpy().tobytes())] ^= 1
        path.write_bytes(
            {"truncated": content[: len(content) // 2], "empty": b""}.get(damage, content)
        )
    wanted = (
        r"^\S+update-00000004/state\.pt is damaged: remove its folder to go on from "
        r"\S+update-00000002$"
    )
    with pytest.raises(ValueError, match=wanted):
        run(tmp_path, resume=True)
    assert Store(tmp_path).updates() == [2, 4]


def test_other_settings_are_named(tmp_path):
    stopped_at(tmp_path)
    with pytest.raises(
        ValueError, match="other settings: batch_size was 4 and is 3, seed was 0 and is 7; pass"
    ):
        run(tmp_path, resume=True, batch_size=3, seed=7)
    with pytest.raises(ValueError, match="other settings: captions was 27 and is 30; pass"):
        run(tmp_path, resume=True, length=30)


def test_another_model_is_named(tmp_path):
    stopped_at(tmp_path)
    task = ToyTask()
    task.model.rare = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=rf"rare is \({DIM},\) in it and \(1,\) in this one"):
        run(tmp_path, task=task, resume=True)
    task = ToyTask()
    task.model.head.requires_grad_(False)
    with pytest.raises(ValueError, match=rf"head\.bias is \({DIM},\) in it and not there in this"):
        run(tmp_path, task=task, resume=True)


def test_a_finished_run_is_left_alone(tmp_path, capsys):
    figures = run(tmp_path, max_steps=2)
    before = (tmp_path / "log.jsonl").read_text()
    assert run(tmp_path, max_steps=2, resume=True) == figures
    shown = capsys.readouterr().out
    assert f"{tmp_path} is finished, after 2 updates: nothing to resume" in shown
    assert (tmp_path / "log.jsonl").read_text() == before


def test_resume_and_the_folder_must_agree(tmp_path):
    stopped_at(tmp_path)
    with pytest.raises(ValueError, match=r"holds a training already .*: pass --resume"):
        run(tmp_path)
    with pytest.raises(ValueError, match="holds no training to resume"):
        run(tmp_path / "other", resume=True)
    assert not (tmp_path / "other").exists()


def test_a_run_that_saved_nothing_can_be_begun_again(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "log.jsonl").write_text('{"kind": "update", "update": 1, "loss": 9}\n')
    run(tmp_path, max_steps=2)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    updates = [json.loads(line)["update"] for line in lines if "learning_rate" in line]
    assert updates == [1, 2]


def test_what_cannot_be_trained(tmp_path):
    task = ToyTask()
    task.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^nothing to train"):
        run(tmp_path, task=task)
    with pytest.raises(ValueError, match="27 captions, fewer than one update's 28 "):
        run(tmp_path, batch_size=14, accumulation=2)
    with pytest.raises(ValueError, match="fsdp divides a model among processes"):
        run(tmp_path, fsdp=True)
    with pytest.raises(ValueError, match="precision fp16 needs a GPU"):
        run(tmp_path, precision="fp16")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="fsdp cannot divide temperature, a number"):
        shard(ToyTask().model)
    task = ToyTask()
    task.kept = lambda: ["momenta"]
    with pytest.raises(ValueError, match="the task keeps 'momenta', which its model does not"):
        run(tmp_path, task=task)


@pytest.mark.parametrize(
    "name", ["epochs", "batch_size", "accumulation", "max_steps", "learning_rate"]
)
def test_settings_out_of_range(name):
    with pytest.raises(ValueError, match=f"^{name} is 0"):
        Training(**{name: 0})


def test_schedules():
    settings = Training(epochs=4, learning_rate=2.0)
    rates = [learning_rate(settings, update, 3, 12) for update in range(12)]
    wanted = [2 * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert rates == pytest.approx([rate for rate in wanted for _ in range(3)])
    each = replace(settings, schedule="cosine", warmup_steps=2)
    rates = [learning_rate(each, update, 3, 12) for update in range(13)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[7] == pytest.approx(1.0)
    assert rates[12] == pytest.approx(0.0)
    flat = replace(settings, schedule="constant", warmup_steps=4)
    rates = [learning_rate(flat, update, 3, 12) for update in range(12)]
    assert rates == [0.5, 1.0, 1.5, *[2.0] * 9]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_what_matters(terminal, monkeypatch):
    monkeypatch.setattr("tokenmix_ops.video.engine.progress.SECONDS_BETWEEN_LINES", 0)
    console = Console(force_terminal=terminal, width=120, record=True)
    line = {"update": 4, "loss": 0.5, "clips_per_second": 12.0, "memory": 2**30}
    with Progress(console, total=10, done=3, per_epoch=3) as progress:
        progress.update(line)
        assert list(progress.track([1, 2], "val")) == [1, 2]
        progress.bar.refresh()
    shown = console.export_text()
    left = "-:--:--" if terminal else "0:00:00 left"
    for text in ("epoch 2", "4", "10", "loss 0.5000, 12.0 clips/s, 1.0 GiB", left):
        assert text in shown
    quiet = Console(quiet=True, force_terminal=terminal, record=True)
    with Progress(quiet, total=10, done=3, per_epoch=3) as progress:
        progress.update(line)
    assert not quiet.export_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_gpu_resumes_bit_for_bit(tmp_path, monkeypatch, precision):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    from accelerate.state import PartialState

    PartialState._reset_state()
    run(tmp_path / "whole", save_every=4, precision=precision)
    task = ToyTask()
    stop_after(task, 7)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", task=task, save_every=4, precision=precision)
    run(tmp_path / "cut", resume=True, save_every=4, precision=precision)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    states = [Store(tmp_path / name).read(12)["scaler"] for name in ("cut", "whole")]
    assert states[0] == states[1]
    assert (states[0] is not None) == (precision == "fp16")
    PartialState._reset_state()


@pytest.mark.interfaces
def test_a_second_training_may_have_another_precision():
    """accelerate keeps the first one's, unless its state is reset."""
    for precision in ("no", "bf16", "no"):
        accelerator = start_accelerator(Training(precision=precision))
        assert accelerator.mixed_precision == precision

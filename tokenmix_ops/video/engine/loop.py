"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object, send_to_device
from rich.console import Console
from torch import Tensor, distributed
from torch.utils.data import Dataset

from tokenmix_ops.video.data.workers import OutliveSignals
from tokenmix_ops.video.engine.batches import TrainingBatches, loader_of
from tokenmix_ops.video.engine.checkpointing import checkpoint_layers
from tokenmix_ops.video.engine.hyperparameters import Training
from tokenmix_ops.video.engine.interrupts import Interrupts
from tokenmix_ops.video.engine.log import Log
from tokenmix_ops.video.engine.placement import place, start_accelerator, whole
from tokenmix_ops.video.engine.progress import Progress, peak_memory, say
from tokenmix_ops.video.engine.randomness import random_state, set_random_state, unmoved
from tokenmix_ops.video.engine.schedule import learning_rate
from tokenmix_ops.video.engine.state import collect, compare, put_back
from tokenmix_ops.video.engine.store import Store
from tokenmix_ops.video.engine.task import Task
from tokenmix_ops.video.engine.together import by_first, raised_on_all

# Settings that may differ when a training goes on: they do not change the curve.
FREE = ("workers", "save_every")

STOP = "stop"
"""Reported with the losses of an update: how many processes had been told to stop."""


def train(
    task: Task,
    dataset: Dataset[Any],
    settings: Training,
    out: Path,
    *,
    collate: Callable[[list[Any]], Any] | None = None,
    resume: bool = False,
    select_on: Literal["val", "test"] | None = None,
    console: Console | None = None,
    remark: Callable[[], str | None] | None = None,
) -> dict[str, Any]:
    """Trains a task's model in place, and writes checkpoints, states and the curve to ``out``.

    ``dataset`` takes (epoch, index) as its keys and has a length; ``collate`` turns its items into
    a batch. ``resume`` continues from the newest saved state, bit for bit on one device.
    ``task.weight`` weights the losses of a global batch, so results do not depend on how processes
    and accumulation split it, as long as the task averages over independent samples, as captioning
    does. Retrieval contrasts each pair with all pairs of its batch across processes: splitting by
    process changes nothing, but accumulation leaves fewer negatives. With ``select_on``, the task
    is evaluated on that split; best.safetensors holds the best epoch by "score", as the first
    process sees it, and last.safetensors the last one. The text that ``remark`` returns at the end
    of an epoch is printed.

    Returns "updates", "loss" of the last one, and the figures of the "last" and the "best"
    evaluation, or None. Raises ValueError for a run that cannot start or resume and for a loss that
    is not finite; OSError for files that cannot be written; KeyboardInterrupt after Ctrl-C
    or SIGTERM to any process, once the update (on a GPU, the next one) is finished and its state
    saved. A second signal ends a process at once, and so does one in an evaluation, before which
    the state was saved. A launcher waits only so long: torchrun, 30 seconds.
    """
    if not any(parameter.requires_grad for parameter in task.model.parameters()):
        raise ValueError(
            "nothing to train: no parameter of the model requires a gradient, choose another "
            "tuning method or switch a part of it on"
        )
    store = Store(out)
    tensorboard = find_spec("tensorboard") is not None
    accelerator = start_accelerator(
        settings,
        log_with="tensorboard" if tensorboard else None,
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
    )
    console = console or Console()
    if not accelerator.is_main_process:
        console = Console(quiet=True)
    # Nobody writes before everybody has looked.
    with raised_on_all():
        store.check(resume)
    figures: dict[str, Any] | None = by_first(store.finished)
    if figures is not None:
        say(console, f"{out} is finished, after {figures['updates']} updates: nothing to resume")
        return figures
    if not tensorboard:
        say(console, "tensorboard is not installed: the curve is in log.jsonl alone")
    run = _Run(task, dataset, settings, store, accelerator, console, collate, select_on, remark)
    return run.run(resume)


class _Run:
    """One training, from where it stands to its end."""

    def __init__(
        self,
        task: Task,
        dataset: Dataset[Any],
        settings: Training,
        store: Store,
        accelerator: Accelerator,
        console: Console,
        collate: Callable[[list[Any]], Any] | None,
        select_on: str | None,
        remark: Callable[[], str | None] | None,
    ) -> None:
        self.remark = remark
        self.task, self.settings, self.store = task, settings, store
        self.accelerator, self.console, self.select_on = accelerator, console, select_on
        self.device, self.world = accelerator.device, accelerator.num_processes
        length = len(dataset)  # type: ignore[arg-type]
        self.batches = TrainingBatches(
            length, settings, rank=accelerator.process_index, world=self.world
        )
        self.per_epoch, self.total = self.batches.per_epoch, self.batches.total
        self.workers = OutliveSignals(settings.workers)
        self.loader = loader_of(dataset, self.batches, settings, collate, self.device, self.workers)
        self.identity = {
            **{name: value for name, value in asdict(settings).items() if name not in FREE},
            "task": task.name,
            "captions": length,
            "processes": self.world,
            "select_on": select_on,
        }
        if settings.gradient_checkpointing:
            checkpoint_layers(task.model)
        self.model = place(task.model, accelerator, settings.fsdp)
        trained = [p for p in task.model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(
            trained, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.optimizer = accelerator.prepare_optimizer(self.adamw)
        self.trained = trained
        self.update = 0
        self.loss = float("nan")
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.pending: list[_Reading] = []
        self.stopping = False

    def run(self, resume: bool) -> dict[str, Any]:
        """Trains to the end; see ``train``."""
        by_first(self.store.make)
        torch.manual_seed(self.settings.seed + self.accelerator.process_index)
        if resume:
            self.go_on()
        main = self.accelerator.is_main_process
        with ExitStack() as stack:
            stack.callback(self.workers.end)
            self.log: Log = Log(self.store.log if main else None, self.update)
            stack.callback(self.log.close)
            self.start_trackers(stack)
            self.progress = stack.enter_context(
                Progress(self.console, total=self.total, done=self.update, per_epoch=self.per_epoch)
            )
            self.interrupts = stack.enter_context(Interrupts())
            self.loop()
        figures = {
            "updates": self.update,
            "loss": self.loss,
            "last": self.history[-1] if self.history else None,
            "best": self.best,
        }
        by_first(lambda: self.store.finish(figures))
        return figures

    def loop(self) -> None:
        """All remaining updates, states and evaluations."""
        if self.update and self.ends_epoch():
            self.evaluate()
        self.batches.start = self.update
        stream = iter(self.loader)
        self.task.model.train()
        self.clock = time.monotonic()
        while self.update < self.total:
            self.one_update(stream)
            every = self.settings.save_every
            due = self.ends_epoch() or (every > 0 and self.update % every == 0)
            if due or self.stopping:
                self.save()
                self.clock = time.monotonic()
            if self.stopping:
                raise KeyboardInterrupt(
                    f"stopped after update {self.update}, which is saved; --resume goes on from it"
                )
            if self.ends_epoch():
                if self.remark is not None and (text := self.remark()) is not None:
                    self.progress.say(text)
                self.evaluate()
                self.clock = time.monotonic()
        self.task.model.eval()

    def ends_epoch(self) -> bool:
        """Whether the updates so far end an epoch, or the training."""
        return self.update % self.per_epoch == 0 or self.update == self.total

    def one_update(self, stream: Iterator[Any]) -> None:
        """One step of the optimiser, over all its batches on all processes."""
        settings = self.settings
        batches = [next(stream) for _ in range(settings.accumulation)]
        weights = [float(self.task.weight(batch)) for batch in batches]
        whole_weight = self.summed(torch.tensor(sum(weights), dtype=torch.float32))
        rate = learning_rate(settings, self.update, self.per_epoch, self.total)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        parts: dict[str, Tensor] = {}
        for number, (batch, weight) in enumerate(zip(batches, weights, strict=True), 1):
            batch = send_to_device(batch, self.device, non_blocking=True)
            share = weight / whole_weight
            last = number == settings.accumulation
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    losses = self.model(batch, self.update / self.per_epoch)
                # Gradients are averaged over the processes, and shares add up to one over all.
                self.accelerator.backward(losses["loss"].float() * (share * self.world))
            for name, loss in losses.items():
                parts[name] = parts.get(name, 0.0) + loss.detach().float() * share
        # All processes have to stop after the same update, so they ask each other in each.
        parts[STOP] = torch.full((), float(self.interrupts.requested), device=self.device)
        values = self.summed(torch.stack(list(parts.values())))
        names = list(parts)
        if settings.max_grad_norm is not None:
            norm = self.accelerator.clip_grad_norm_(self.trained, settings.max_grad_norm)
            values = torch.cat((values, _plain(norm).detach().reshape(1)))
            names.append("grad_norm")
        self.optimizer.step()
        self.optimizer.zero_grad()
        # A step that overflowed in fp16 changed nothing: the scaler retries with a smaller scale.
        if not self.accelerator.optimizer_step_was_skipped:
            self.task.after_update()
        self.update += 1
        self.pending.append(_Reading(self.update, rate, names, values))
        # On a GPU a loss is read while the next update runs, so that neither waits for the other.
        self.read_losses(0 if self.device.type == "cpu" else 1)

    def summed(self, value: Tensor) -> Tensor:
        """The sum over all processes, on the device."""
        if self.world == 1:
            return value
        value = value.to(self.device)
        distributed.all_reduce(value)
        return value

    def read_losses(self, leave: int) -> None:
        """Logs updates up to the ``leave`` last, and notes whether a process was told to stop;
        ValueError if a loss is not finite."""
        while len(self.pending) > leave:
            reading = self.pending.pop(0)
            values = reading.values()
            self.stopping |= values.pop(STOP) > 0
            for name, value in values.items():
                # An overflow in fp16 shows in the gradient's norm, and is the scaler's to handle.
                if name != "grad_norm" and not abs(value) < float("inf"):
                    raise ValueError(
                        f"{name} is {value} at update {reading.update}: lower learning_rate, or "
                        "choose bf16 or no mixed precision; the states saved before are good"
                    )
            now = time.monotonic()
            seconds, self.clock = now - self.clock, now
            clips = self.settings.batch_size * self.settings.accumulation * self.world
            line = {
                "update": reading.update,
                "epoch": (reading.update - 1) // self.per_epoch,
                **values,
                "learning_rate": reading.rate,
                "clips_per_second": clips / max(seconds, 1e-9),
                "seconds": seconds,
                "memory": peak_memory(self.device),
            }
            self.loss = values["loss"]
            self.log.add("update", line)
            self.accelerator.log(line, step=reading.update)
            self.progress.update(line)

    def evaluate(self) -> None:
        """Evaluates where it is due, and writes the checkpoints of the epoch."""
        task, epoch = self.task, -(-self.update // self.per_epoch)
        due = epoch % self.settings.evaluate_every == 0 or self.update == self.total
        figures: dict[str, Any] = {"update": self.update, "epoch": epoch}
        best = False
        with whole(task.model), self.interrupts.at_once():
            if self.select_on is not None and due:
                with unmoved(self.device), torch.no_grad():
                    own = task.evaluate(self.accelerator, self.select_on, self.progress)
                # They may differ by a rounding, and all have to choose the same epoch.
                found = by_first(lambda: own)
                task.model.train()
                numbers = {n: float(v) for n, v in found.items() if not isinstance(v, str)}
                texts = {name: value for name, value in found.items() if isinstance(value, str)}
                figures.update({**numbers, **texts})
                best = figures["score"] > (self.best["score"] if self.best else float("-inf"))
                self.history.append(figures)
                self.log.add("evaluation", {"split": self.select_on, **figures})
                shown = {f"{self.select_on}/{name}": value for name, value in numbers.items()}
                self.accelerator.log(shown, step=self.update)
                said = [f"{name} {value:.2f}" for name, value in numbers.items()]
                said += [f"{name} {value}" for name, value in texts.items()]
                self.progress.say(f"epoch {epoch}, {self.select_on}: {', '.join(said)}")
            if best:
                self.best = figures
                by_first(lambda: task.save_updated(self.store.best, figures))
            by_first(lambda: task.save_updated(self.store.last, figures))

    def save(self) -> None:
        """Saves the state; losses are read before, so that none after a bad one is saved."""
        self.read_losses(0)
        main = self.accelerator.is_main_process
        scaler = self.accelerator.scaler
        state = {
            "identity": self.identity,
            "update": self.update,
            "loss": self.loss,
            "history": self.history,
            "best": self.best,
            "random": gather_object([random_state(self.device)]),
            "scaler": scaler.state_dict() if scaler is not None else None,
            **collect(self.task.model, self.adamw, self.task.kept(), keep=main),
        }
        self.log.sync()
        by_first(lambda: self.store.write(self.update, state))

    def go_on(self) -> None:
        """Loads the newest state; starts from the beginning if none was saved."""
        updates = by_first(self.store.updates)
        if not updates:
            say(self.console, "no state was saved yet: starting from the beginning")
            return
        with raised_on_all():
            state = self.fitting(updates[-1])
        put_back(self.task.model, self.adamw, self.task.kept(), state)
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.update, self.loss = state["update"], state["loss"]
        self.history, self.best = state["history"], state["best"]
        set_random_state(self.device, state["random"][self.accelerator.process_index])
        say(self.console, f"resuming after update {self.update} of {self.total}")

    def fitting(self, update: int) -> dict[str, Any]:
        """The state after an update; ValueError if it is damaged or of another training."""
        state = self.store.read(update)
        folder = self.store.folder(update)
        saved, here = state["identity"], self.identity
        if differing := [name for name in here if saved.get(name) != here[name]]:
            changes = ", ".join(f"{n} was {saved.get(n)} and is {here[n]}" for n in differing)
            raise ValueError(
                f"{folder} was saved with other settings: {changes}; pass the same settings "
                "or another --out"
            )
        try:
            compare(self.task.model, self.task.kept(), state)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        return state

    def start_trackers(self, stack: ExitStack) -> None:
        """TensorBoard, where it is installed."""
        if self.accelerator.log_with:
            purge = {"tensorboard": {"purge_step": self.update + 1}}
            self.accelerator.init_trackers("tensorboard", init_kwargs=purge)
            for tracker in self.accelerator.trackers:
                stack.callback(tracker.finish)


class _Reading:
    """Losses on their way from the device."""

    def __init__(self, update: int, rate: float, names: list[str], values: Tensor) -> None:
        self.update, self.rate, self.names = update, rate, names
        self.host, self.done = values, None
        if values.is_cuda:
            self.host = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()

    def values(self) -> dict[str, float]:
        """The losses by name; waits for the update to be computed, not for what follows."""
        if self.done is not None:
            self.done.synchronize()
        return dict(zip(self.names, self.host.tolist(), strict=True))


def _plain(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value

"""A task of a few hundred weights with all that makes resuming and several processes hard."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tokenmix_ops.video.data.sampling import generator_for
from tokenmix_ops.video.engine import Training, store, train

DIM = 6


class ToyData:
    """Samples that depend on the epoch and the index."""

    def __init__(self, length=27):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, sample):
        generator = generator_for(1, *sample)
        tokens = torch.randint(1, 5, (), generator=generator)
        return {"x": torch.randn(DIM, generator=generator), "tokens": tokens, "index": sample[1]}


class ToyLayer(GradientCheckpointingLayer):
    def __init__(self, dropout, shared):
        super().__init__()
        self.shared = shared
        self.linear = nn.Linear(DIM, DIM)
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.dropout(self.linear(self.shared(x)).tanh())


class ToyModel(nn.Module):
    def __init__(self, dropout, rare):
        super().__init__()
        self.frozen = nn.Linear(DIM, DIM).requires_grad_(False)
        shared = nn.Linear(DIM, DIM).requires_grad_(False)
        self.layers = nn.ModuleList(ToyLayer(dropout, shared) for _ in range(2))
        self.head = nn.Linear(DIM, DIM)
        self.momentum = nn.Linear(DIM, DIM).requires_grad_(False)
        self.rare = nn.Parameter(torch.ones(DIM), requires_grad=rare)
        self.temperature = nn.Parameter(torch.ones(() if rare else 1))
        self.register_buffer("queue", torch.zeros(DIM))

    def forward(self, batch, epoch):
        x = self.frozen(batch["x"])
        for layer in self.layers:
            x = layer(x)
        rare = batch["index"] % 9 == 4
        if rare.any():
            x = x + self.rare * rare[:, None]
        with torch.no_grad():
            target = self.momentum(batch["x"]).sin() + self.queue
        error = (self.head(x) * self.temperature - target).pow(2).mean(1)
        tokens = batch["tokens"]
        loss = (error * tokens).sum() / tokens.sum() * (1 + 0.1 * epoch)
        return {"loss": loss, "error": (error * tokens).sum().detach() / tokens.sum()}


class ToyTask:
    name = "toy"

    def __init__(self, dropout=0.1, seed=0, rare=True):
        torch.manual_seed(seed)
        self.model = ToyModel(dropout, rare)
        self.updates = 0

    def kept(self):
        return ("momentum.weight", "momentum.bias")

    def weight(self, batch):
        return batch["tokens"].sum()

    @torch.no_grad()
    def after_update(self):
        self.updates += 1
        model = self.model
        model.momentum.weight.lerp_(model.head.weight, 0.1)
        model.momentum.bias.lerp_(model.head.bias, 0.1)
        model.queue.mul_(0.5).add_(0.1)

    def evaluate(self, accelerator, split, progress):
        self.model.eval()
        torch.rand(3)
        x = torch.linspace(-1, 1, 2 * DIM, device=accelerator.device).view(2, DIM)
        for _ in progress.track(range(2), split):
            y = self.model.layers[0](x)
        return {"score": -float(self.model.head(y).pow(2).mean())}

    def save_updated(self, path, figures):
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        part = path.with_name(path.name + ".part")
        save_file(weights, part, {"figures": json.dumps(figures)})
        part.replace(path)


def run(out, *, task=None, resume=False, length=27, dropout=0.1, select_on="val", **settings):
    """Trains a toy: 2 epochs of 6 updates unless told otherwise."""
    chosen = {"epochs": 2, "batch_size": 4, "learning_rate": 0.05, "workers": 0, **settings}
    task = task or ToyTask(dropout)
    return train(task, ToyData(length), Training(**chosen), out, resume=resume, select_on=select_on)


def run_and_die(out, where, number, settings):
    """Trains until the ``number``-th time something happens, and is killed there."""
    torch.set_num_threads(1)
    count = 0

    def die_there(*_):
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    task = ToyTask()
    if where == "update":
        task.after_update = lambda own=task.after_update: (own(), die_there())
    elif where == "evaluation":
        task.evaluate = lambda *a, own=task.evaluate: (own(*a), die_there())[0]
    elif where == "checkpoint":
        task.save_updated = die_there
    elif where == "write":

        def half(state, file, save=torch.save):
            save(state, file)
            file.truncate(file.tell() // 2)
            die_there()
            file.seek(0)
            file.truncate()
            save(state, file)

        store.save = half
    elif where == "renamed":
        store.sync_folder = lambda folder, own=store.sync_folder: (own(folder), die_there())
    run(out, task=task, **settings)
    raise AssertionError("it lived")


def rank(index, port, jobs):
    """One of two processes: runs jobs, (folder, settings, what happens).

    That is None, a number of updates after which it fails, or the name of a mishap; it goes on
    from there.
    """
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    for out, settings, fails in jobs:
        # Another seed on the second process: the first one's weights must win.
        task = ToyTask(0.0, index, rare=False)
        if fails is None:
            run(out, task=task, **settings)
        elif fails == "other scores":
            if index:
                task.evaluate = lambda *a, own=task.evaluate: {"score": -own(*a)["score"]}
            run(out, task=task, **settings)
        else:
            happen(fails, index, task, out, settings)
            run(out, task=ToyTask(0.0, 0, rare=False), resume=True, **settings)
    torch.distributed.destroy_process_group()


def happen(what, index, task, out, settings):
    """Begins a run that ends too early, on both processes."""
    wanted = Stopped
    if what == "evaluation":
        task.evaluate = stop
    elif isinstance(what, int):
        stop_after(task, what)
    elif what == "unreadable":
        stop_after(task, 5)
    elif what == "signal":
        # The second process alone is told to stop.
        wanted = KeyboardInterrupt

        def weight(batch, own=task.weight):
            if index and task.updates == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return own(batch)

        task.weight = weight
    with pytest.raises(wanted):
        run(out, task=task, **settings)
    if what == "signal":
        assert store.Store(out).updates() == [3]
    if what == "unreadable":
        with pytest.MonkeyPatch.context() as patched:
            if index:
                patched.setattr(store.Store, "read", unreadable)
            with pytest.raises(ValueError, match="the second cannot read it"):
                run(out, task=ToyTask(0.0, 0, rare=False), resume=True, **settings)


def unreadable(*_):
    raise ValueError("the second cannot read it")


class Stopped(Exception):
    pass


def stop(*_):
    raise Stopped


def stop_after(task, updates):
    """Has a task raise after so many updates."""

    def after_update(own=task.after_update):
        own()
        if task.updates == updates:
            raise Stopped

    task.after_update = after_update

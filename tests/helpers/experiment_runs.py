"""A small world, tiny models to start from, and experiments that other processes run and lose."""

import json
import os
import signal
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from tokenmix_ops.video import blip, cli
from tokenmix_ops.video.data.manifest import read_manifest
from tokenmix_ops.video.data.shapes import write_world
from tokenmix_ops.video.engine import store
from tokenmix_ops.video.experiments import running
from tokenmix_ops.video.experiments.captioning_task import CaptioningTask
from tokenmix_ops.video.experiments.retrieval_task import RetrievalTask
from tokenmix_ops.video.experiments.settings import (
    Captioning,
    Contrast,
    Decoding,
    Retrieval,
    Videos,
)
from tokenmix_ops.video.text import CaptionTokenizer
from tokenmix_ops.video.tuning import Tuning

SIZE, FRAMES = 32, 2
TASKS = ("captioning", "retrieval")


def write_all(folder):
    """A world of 20 clips, of captions long and short, and a tiny model for each task."""
    write_world(folder / "world", 20, size=SIZE, num_frames=3)
    data = folder / "world" / "videos.jsonl"
    videos = read_manifest(data).videos
    tokenizer = CaptionTokenizer.from_captions(c for video in videos for c in video.captions)
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        model = blip.tiny_blip(
            task,
            tokenizer.vocab_size,
            image_size=SIZE,
            patch_size=16,
            vision_layers=2,
            text_layers=1,
        )
        model.save_pretrained(folder / task)
        tokenizer.save(folder / task)
    return folder


def experiment(task, folder, *, method="spatial", select_on="none", tuning=None, **training):
    """An experiment of a few updates on what `write_all` wrote."""
    default = {"captioning": Captioning, "retrieval": Retrieval}[task]()
    chosen = dict(epochs=1, batch_size=4, learning_rate=1e-3, workers=0, schedule="constant")
    changes = dict(
        videos=Videos(
            folder / "world" / "videos.jsonl",
            num_frames=FRAMES,
            image_size=SIZE,
            select_on=select_on,
        ),
        model=str(folder / task),
        tuning=Tuning(method, **(tuning or {})),
        training=replace(default.training, **{**chosen, **training}),
    )
    if task == "captioning":
        changes["decoding"] = Decoding(num_beams=2, max_length=8)
    else:
        changes.update(contrast=Contrast(queue_size=24, momentum=0.9), rerank=2)
    return replace(default, **changes)


def run(one, out, resume=False):
    """Runs an experiment without a word."""
    return running.run(one, out, resume=resume, console=Console(quiet=True))


def losses(out):
    """The curve, without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    vary = ("clips_per_second", "seconds", "memory")
    return [{name: v for name, v in line.items() if name not in vary} for line in lines]


def without_dropout():
    """The text side is trained without dropout from now on."""
    blip.TRAINING.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def run_and_die(one, out, where, number):
    """Runs an experiment until the ``number``-th update or state's write, and is killed there."""
    torch.set_num_threads(1)
    count = 0

    def die_there():
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    if where == "update":
        for kind in (CaptioningTask, RetrievalTask):

            def after_update(self, own=kind.after_update):
                own(self)
                die_there()

            kind.after_update = after_update
    else:

        def half(state, file, save=torch.save):
            save(state, file)
            file.truncate(file.tell() // 2)
            die_there()
            file.seek(0)
            file.truncate()
            save(state, file)

        store.save = half
    run(one, out)
    raise AssertionError("it lived")


def join(index, world, port):
    """Has this process be one of so many."""
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index))
    os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)


def begin(index, world, port, one, out):
    """One of many processes that begin the same experiments; the first one alone may write."""
    join(index, world, port)
    if index:
        running.replace_text = blip.BlipForConditionalGeneration.save_pretrained = write_nothing
    run(one, out / "begun")
    # What the first process cannot do, all say.
    (out / "file").write_text("")
    for where, text in ((out / "file" / "in it", "in it"), (out / "begun", "pass --resume")):
        with pytest.raises((OSError, ValueError), match=text):
            run(one, where)
    torch.distributed.destroy_process_group()


def write_nothing(*_, **__):
    raise AssertionError("not the first process")


def rank(index, port, jobs):
    """One of two processes that run experiments, without dropout."""
    join(index, 2, port)
    without_dropout()
    for one, out in jobs:
        run(one, out)
    one, out = jobs[0]
    folder = out.parent
    data = ("--data", str(one.videos.data), "--workers", "0", "--json")
    again = ("--config", str(out / "experiment.yaml"), "--out", str(folder / "command"))
    best = str(folder / "command" / "best.safetensors")
    with (folder / f"printed{index}").open("w") as printed, redirect_stdout(printed):
        cli.main(["caption", "train", *again, *data])
        cli.main(["caption", "evaluate", best, "--split", "val", "--no-meteor", *data])
    torch.distributed.destroy_process_group()

"""Steps per second and peak memory of fine-tuning a captioner, by method, on random data.

The size is the paper's on a CUDA GPU, and one video in 4 layers on a CPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from bench.passes import Part, failure
from bench.published import as_published
from bench.rows import Row
from bench.tables.tuning import FROZEN_PATCHES, TOKEN_MIXING
from tokenmix_ops.timing import Clock, figures, rounded, time_in_turn
from tokenmix_ops.video.blip import blip_config, build_blip
from tokenmix_ops.video.captioning import VideoCaptioner
from tokenmix_ops.video.tuning import Tuning, apply

TUNINGS = {
    "full": Tuning("full"),
    "dual_attention": Tuning("dual_attention"),
    "st_adapter": Tuning("st_adapter"),
    "temporal": Tuning("temporal"),
    "adapter": Tuning("adapter"),
    "bitfit": Tuning("bitfit"),
    TOKEN_MIXING: Tuning("token_mixing"),
    FROZEN_PATCHES: Tuning("token_mixing", linear_projection=False),
    "token_mixing (F)": Tuning("token_mixing", everything=True),
    "spatial (P)": Tuning("spatial"),
    "spatial (F)": Tuning("spatial", everything=True),
    "lora": Tuning("lora"),
    "frozen, language head updated": Tuning("frozen", language_head=True),
}
"""What is trained, by the names in tables; the paper's methods first, in the order of Table 1."""
OURS_ALONE = ("lora", "frozen, language head updated")
"""Those that the paper does not compare."""

Way = Literal["tokenmix_ops", "published"]
LEARNING_RATE, WEIGHT_DECAY = 1e-5, 0.05
RUN_SECONDS = 3.0
"""How long each run is timed, about."""
FEWEST_ROUNDS, MOST_ROUNDS = 3, 21


@dataclass(frozen=True)
class Run:
    """A tuning, the type that it is computed in (bfloat16 by autocast), and the way."""

    name: str
    dtype: torch.dtype
    way: Way = "tokenmix_ops"

    def __str__(self) -> str:
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}, {self.way}"


@dataclass(frozen=True)
class Size:
    """A batch, by default the paper's, and what differs from BLIP ViT-B/16 in the model."""

    batch: int = 16
    num_frames: int = 8
    image_size: int = 224
    length: int = 40
    """Tokens of a caption."""
    vision: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)


def build(run: Run, size: Size) -> VideoCaptioner:
    """The run's model on PyTorch's default device, with random weights."""
    config = blip_config(
        "vit-b16", "captioning", image_size=size.image_size, vision=size.vision, text=size.text
    )
    blip: Any = build_blip(config, "captioning")
    model = VideoCaptioner(blip, num_frames=size.num_frames)
    apply(model, TUNINGS[run.name])
    return as_published(model) if run.way == "published" else model


class Training:
    """A model of `build` on random data, on the default device; ``step()`` is one update."""

    def __init__(self, model: VideoCaptioner, run: Run, size: Size) -> None:
        self.model = model.train()
        self.updated = [p for p in self.model.parameters() if p.requires_grad]
        # As PyTorch chooses by itself on a GPU.
        self.optimizer = torch.optim.AdamW(
            self.updated, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, foreach=True
        )
        picture = (3, size.image_size, size.image_size)
        input_ids = torch.randint(
            model.blip_config.text_config.vocab_size, (size.batch, size.length)
        )
        self.batch = (
            torch.randn(size.batch, size.num_frames, *picture),
            input_ids,
            torch.ones_like(input_ids),
        )
        self.mixed_precision = run.dtype is torch.bfloat16

    def loss(self) -> torch.Tensor:
        """The forward pass."""
        device = self.batch[0].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.mixed_precision):
            loss: torch.Tensor = self.model(*self.batch)
        return loss

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def about(run: Run, size: Size) -> Row:
    """The facts of a run that its row tells."""
    tuning = {name: value for name, value in asdict(TUNINGS[run.name]).items() if value is not None}
    sizes = {**asdict(size), "vision": dict(size.vision), "text": dict(size.text)}
    dtype = str(run.dtype).removeprefix("torch.")
    return {"run": run.name, "way": run.way, "dtype": dtype, "tuning": tuning, **sizes}


def heat_rows(
    heat: str, runs: Sequence[Run], size: Size, clock: Clock, device: str, seconds: float
) -> list[Row]:
    """Rows of some runs, timed in turn; one that runs out of memory says why.

    The peak of a run's memory is that of its second update, what the others hold not counted.
    """
    rows: dict[Run, Row] = {run: {"heat": heat, **about(run, size)} for run in runs}
    ready: dict[Run, Training] = {}
    on_gpu = device == "cuda"

    def prepare(run: Run) -> None:
        before = torch.cuda.memory_allocated() if on_gpu else 0
        with torch.device(device):
            training = Training(build(run, size), run, size)
        training.step()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        training.step()
        clock.wait()
        rows[run]["updated"] = sum(p.numel() for p in training.updated)
        if on_gpu:
            rows[run]["peak_gib"] = rounded((torch.cuda.max_memory_allocated() - before) / 2**30)
        ready[run] = training

    def race() -> None:
        turns = {str(run): partial(_always, training.step) for run, training in ready.items()}
        one_round = sum(sum(times) for times in time_in_turn(turns, 1, clock).values())
        rounds = int(seconds * len(turns) / max(one_round, 1e-6))
        rounds = min(max(rounds, FEWEST_ROUNDS), MOST_ROUNDS)
        timings = time_in_turn(turns, rounds, clock)
        for run in ready:
            rows[run] |= figures(timings[str(run)])
            rows[run]["steps_per_s"] = rounded(1e3 / rows[run]["median_ms"])

    for run in runs:
        why = failure(partial(prepare, run))
        # Models hold themselves in cycles, and the next one needs the room.
        gc.collect()
        if why:
            rows[run]["reason"] = why
    if ready and (why := failure(race)):
        for run in ready:
            rows[run]["reason"] = f"beside the others: {why}"
    ready.clear()
    gc.collect()
    return list(rows.values())


def _always(step: Callable[[], object], number: int) -> Callable[[], object]:
    return step


def heats(device: str) -> dict[str, list[Run]]:
    """What is measured, by name, the most important first: runs of a heat are timed in turn."""
    if device == "cpu":
        names = (TOKEN_MIXING, FROZEN_PATCHES, "spatial (P)", "full")
        ours = [Run(name, torch.float32) for name in names]
        return {"targets": [*ours, Run(TOKEN_MIXING, torch.float32, "published")]}
    targets = [
        Run(TOKEN_MIXING, torch.bfloat16),
        Run(FROZEN_PATCHES, torch.bfloat16),
        Run(TOKEN_MIXING, torch.float32, "published"),
        Run(TOKEN_MIXING, torch.bfloat16, "published"),
    ]
    others = [run for run in all_runs() if run not in targets]
    return {"targets": targets, **{str(run): [run] for run in others}}


def all_runs() -> list[Run]:
    """Every tuning in both types, and what the paper compares in the authors' way as well."""
    ours = [Run(name, dtype) for dtype in (torch.bfloat16, torch.float32) for name in TUNINGS]
    theirs = [Run(name, torch.float32, "published") for name in TUNINGS if name not in OURS_ALONE]
    return [*ours, *theirs, Run(TOKEN_MIXING, torch.bfloat16, "published")]


SIZES = {
    "cuda": Size(),
    "cpu": Size(batch=1, vision={"num_hidden_layers": 4}, text={"num_hidden_layers": 4}),
}


def parts(
    device: str, size: Size, clock: Clock, seconds: float = RUN_SECONDS
) -> Iterator[tuple[str, Part]]:
    """The heats of a device as parts for `run_parts`."""
    for name, runs in heats(device).items():
        yield name, partial(heat_rows, name, runs, size, clock, device, seconds)

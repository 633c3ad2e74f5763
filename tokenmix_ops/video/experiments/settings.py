"""An experiment: every setting that affects the result of a training run, as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Suppress

from tokenmix_ops.video.engine.hyperparameters import Training
from tokenmix_ops.video.tuning.spec import Tuning

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Videos:
    """Which videos to read, and how; ValueError for numbers out of range."""

    data: Path | None = None
    """JSON lines, one per video: video, video_id, captions, split, and start, end in seconds."""
    root: Path | None = None
    """Folder that paths in the data are relative to; by default the folder of the data."""
    strict: bool = False
    """Fail on duplicates, blank captions and unknown splits instead of dropping them."""
    max_unreadable: float = 0.1
    """Share of a split's videos that may be missing or unreadable; they are skipped and listed."""
    num_frames: int = 8
    """Frames per video."""
    fps: float | None = None
    """Frame rate to sample frames from, by default the video's own; the authors extracted 3 to 5
    frames per second."""
    cache: Path | None = None
    """Folder to cache decoded frames in; set --fps to keep it small."""
    cache_gib: float = 50.0
    """Largest size of the cache in GiB."""
    image_size: int = 224
    """Side of a frame in pixels; position embeddings are resized to match."""
    select_on: Literal["val", "test", "none"] = "val"
    """Split to choose the best epoch on; the authors chose on the test split. "none" keeps the
    last epoch."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_unreadable < 1:
            raise ValueError(
                f"max_unreadable is {self.max_unreadable}, it must be at least 0 and below 1"
            )
        for name, value in (("fps", self.fps), ("cache_gib", self.cache_gib)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}, it must be above 0")

    @property
    def selection(self) -> Literal["val", "test"] | None:
        """The split by which the best epoch is chosen; None if the last epoch is kept."""
        return None if self.select_on == "none" else self.select_on


@dataclass(frozen=True)
class Decoding:
    """How captions are generated; ValueError for numbers out of range."""

    num_beams: int = 3
    """Beam size; 3 for MSVD, 5 for MSR-VTT and VATEX."""
    min_length: int = 5
    """Shortest caption in tokens."""
    max_length: int = 32
    """Longest caption in tokens."""
    top_p: float | None = None
    """Sample from the most likely tokens of this total probability instead of beam search."""

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams is {self.num_beams}, it must be at least 1")
        if self.min_length > self.max_length:
            raise ValueError(f"min_length is {self.min_length}, more than max_length")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, it must be above 0 and at most 1")


@dataclass(frozen=True)
class Contrast:
    """The contrastive loss of retrieval (ITC)."""

    queue_size: int = 57_600
    """Earlier pairs that each batch is contrasted with."""
    momentum: float = 0.995
    """Momentum of the momentum encoders."""
    alpha: float = 0.4
    """Weight of the soft targets, ramped up over the first epoch."""
    temperature: float = 0.07
    """Initial temperature of the similarities, which is learnt."""


@dataclass(frozen=True)
class Captioning:
    """Video captioning with BLIP; ValueError for numbers out of range."""

    videos: OmitArgPrefixes[Videos] = field(default_factory=Videos)
    model: str = "Salesforce/blip-image-captioning-base"
    """Model to start from: a hub name, a model directory, or an original BLIP .pth file."""
    tokenizer: str | None = None
    """Vocabulary: a hub name, or a folder with BERT's vocab.txt; None: the model's own, or BERT's
    for a .pth file."""
    tiny: Suppress[bool] = False
    """Start from a small random model instead."""
    drop_path: float = 0.0
    """Stochastic depth of the image tower; BLIP trains ViT-L with 0.1."""
    max_tokens: int = 40
    """Longest caption to train on, in tokens."""
    tuning: OmitArgPrefixes[Tuning] = field(default_factory=Tuning)
    training: OmitArgPrefixes[Training] = field(default_factory=Training)
    decoding: OmitArgPrefixes[Decoding] = field(default_factory=Decoding)

    @property
    def task(self) -> Literal["captioning"]:
        """The name of the task."""
        return "captioning"

    def __post_init__(self) -> None:
        _check_drop_path(self.drop_path)


@dataclass(frozen=True)
class Retrieval:
    """Text-video retrieval with BLIP; ValueError for numbers out of range."""

    videos: OmitArgPrefixes[Videos] = field(default_factory=Videos)
    model: str = "Salesforce/blip-itm-base-coco"
    """Model to start from: a hub name, a model directory, or an original BLIP .pth file."""
    tokenizer: str | None = None
    """Vocabulary: a hub name, or a folder with BERT's vocab.txt; None: the model's own, or BERT's
    for a .pth file."""
    tiny: Suppress[bool] = False
    """Start from a small random model instead."""
    drop_path: float = 0.0
    """Stochastic depth of the image tower; BLIP trains ViT-L with 0.1."""
    max_tokens: int = 35
    """Longest text in tokens."""
    rerank: int = 128
    """Best candidates that the matching head re-ranks; 0 for none."""
    tuning: OmitArgPrefixes[Tuning] = field(default_factory=Tuning)
    training: OmitArgPrefixes[Training] = field(
        default_factory=lambda: Training(epochs=6, batch_size=8)
    )
    contrast: OmitArgPrefixes[Contrast] = field(default_factory=Contrast)

    @property
    def task(self) -> Literal["retrieval"]:
        """The name of the task."""
        return "retrieval"

    def __post_init__(self) -> None:
        _check_drop_path(self.drop_path)
        if self.rerank < 0:
            raise ValueError(f"rerank is {self.rerank}, it must be at least 0")


@dataclass(frozen=True)
class Opening:
    """How to open a checkpoint or a whole model."""

    model: str | None = None
    """The model that was tuned, if it has moved since."""
    tokenizer: str | None = None
    """Vocabulary, if it is neither with the model nor where the checkpoint says."""
    num_frames: int | None = None
    """Frames per video of a whole model; by default what `export` recorded, or 8."""
    image_size: int | None = None
    """Side of a frame in pixels of a whole model; by default what `export` recorded, or 224."""
    fps: float | None = None
    """Frame rate to sample frames from, for a whole model; by default the video's own."""


def _check_drop_path(drop_path: float) -> None:
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path is {drop_path}, it must be at least 0 and below 1")


EXPERIMENTS: dict[str, type[Captioning] | type[Retrieval]] = {
    "captioning": Captioning,
    "retrieval": Retrieval,
}

"""What a stage of a run on a GPU is told, and where its process finds what others left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LOG = "lease.log"


@dataclass(frozen=True)
class Job:
    """What a stage's process has to know."""

    stage: str
    results: Path
    work: Path
    """A folder for notes between processes."""
    seconds: float
    """After which it is killed."""
    dry: bool
    commit: str | None = None
    rows: Path | None = None

    @property
    def note(self) -> Path:
        """What the stage is doing, in case it does not survive that."""
        return self.work / f"note of {self.stage}.json"

    @property
    def log(self) -> Path:
        """All that the run prints."""
        return self.results / LOG

    @property
    def facts(self) -> Path:
        """What all rows say of the machine and the code."""
        return self.work / "facts.json"

    @property
    def kernels(self) -> Path:
        """The cache of compiled Triton kernels."""
        return self.work / "triton"

    @property
    def hits(self) -> Path:
        """Whether kernels were in that cache."""
        return self.work / "hits.jsonl"

    @property
    def compiling(self) -> Path:
        """Exists while kernels are compiled in the background."""
        return self.work / "compiling"

    @property
    def hung(self) -> Path:
        """Tells a `RehearsalClock` that nothing will happen any more."""
        return self.work / "hung"

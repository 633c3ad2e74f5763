"""The folder of a training: its saved states, of which the last good one is never touched."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokenmix_ops.video.files import replace_text, sync_folder, writing


class Store:
    """A training's folder ``out``.

    ``state/update-00000123/state.pt`` is the state after 123 updates; ``log.jsonl`` the curve;
    ``best.safetensors`` and ``last.safetensors`` what was updated; ``figures.json``, written at
    the end, what came out.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.states = out / "state"
        self.log = out / "log.jsonl"
        self.best = out / "best.safetensors"
        self.last = out / "last.safetensors"
        self.figures = out / "figures.json"

    def check(self, resume: bool) -> None:
        """Raises ValueError if there is a training and none is wanted, or the other way round."""
        done = (self.figures, self.last, *map(self.folder, self.updates()))
        there = next((path for path in done if path.exists()), None)
        if there and not resume:
            raise ValueError(
                f"{self.out} holds a training already ({there.name}): pass --resume to go on with "
                "it, or choose another --out"
            )
        # One that ended before its first state was saved can be begun again either way.
        if resume and not there and not self.log.exists():
            raise ValueError(
                f"{self.out} holds no training to resume: leave --resume out to start one"
            )

    def make(self) -> None:
        """Makes the folder, and removes what a process left unfinished; OSError names the path."""
        with writing(self.states):
            self.states.mkdir(parents=True, exist_ok=True)
            for part in self.states.glob("*.part"):
                shutil.rmtree(part)

    def updates(self) -> list[int]:
        """Updates after which there is a state, the oldest first."""
        names = (path.name.removeprefix("update-") for path in self.states.glob("update-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def folder(self, update: int) -> Path:
        """The folder of the state after an update."""
        return self.states / f"update-{update:08d}"

    def write(self, update: int, state: Mapping[str, Any]) -> None:
        """Saves a state, then removes older ones but the previous.

        Written under another name, renamed once it is on the disk. If that fails, what there was
        stays as it was, and OSError names the file.
        """
        folder = self.folder(update)
        part = folder.with_name(folder.name + ".part")
        path = part / "state.pt"
        try:
            with writing(path):
                part.mkdir()
                with path.open("wb") as file:
                    save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
                sync_folder(part)
                part.rename(folder)
                sync_folder(self.states)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        for older in self.updates()[:-2]:
            shutil.rmtree(self.folder(older))

    def read(self, update: int) -> dict[str, Any]:
        """The state after an update, its tensors on the CPU.

        Raises ValueError if the file is damaged.
        """
        path = self.folder(update) / "state.pt"
        try:
            # PyTorch reads a file without looking at its checksums.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip() is not None
            if not damaged:
                return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        except (FileNotFoundError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError):
            pass
        older = [u for u in self.updates() if u < update]
        instead = f"go on from {self.folder(older[-1])}" if older else "start from the beginning"
        raise ValueError(f"{path} is damaged: remove its folder to {instead}")

    def finished(self) -> dict[str, Any] | None:
        """The final figures of a training that is finished, else None."""
        if not self.figures.exists():
            return None
        return dict(json.loads(self.figures.read_text("utf-8")))

    def finish(self, figures: Mapping[str, Any]) -> None:
        """Writes the final figures, by which a training is known to be finished."""
        replace_text(self.figures, json.dumps(figures, indent=2) + "\n")


# A name of its own, so that tests can have it fail half-way.
save = torch.save

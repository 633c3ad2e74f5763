"""Waits for events, so that no test depends on how fast or busy the machine is."""

import fcntl
import os
import time
from types import SimpleNamespace

from tokenmix_ops.video.data import isolation

# Only what hangs takes so long.
FOR_EVER = 600.0


def wait_until(condition):
    """Returns once ``condition()`` holds."""
    end = time.monotonic() + FOR_EVER
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def stop_clock(monkeypatch, jumps):
    """Has the time limits of calls in processes go by when ``jumps()`` holds, and not before."""
    held = 0

    def monotonic():
        nonlocal held
        held += jumps()
        # A call is sent before the time is taken at which it began: this may be that time.
        return 1000.0 if held > 1 else 0.0

    monkeypatch.setattr(isolation, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(isolation, "_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(isolation, "_END_SECONDS", FOR_EVER)


def once(tmp_path_factory, name, write):
    """The folder that ``write(folder)`` fills, once for all processes that pytest-xdist runs."""
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER") and base.name.startswith("popen-"):
        base = base.parent
    folder, written = base / name, base / f"{name}.written"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not written.exists():
            folder.mkdir(exist_ok=True)
            write(folder)
            written.touch()
    return folder

"""Runs a Java program over pipes, in UTF-8 and US English, with a time limit and full cleanup."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

_LOCALE = (
    "-Dfile.encoding=UTF-8",
    "-Dsun.jnu.encoding=UTF-8",
    "-Duser.language=en",
    "-Duser.country=US",
)
# Write no jps file to /tmp, and no crash or heap dump to the working directory.
_TRACELESS = (
    "-XX:+IgnoreUnrecognizedVMOptions",
    "-XX:-UsePerfData",
    "-XX:-HeapDumpOnOutOfMemoryError",
    "-XX:-CreateCoredumpOnCrash",
    f"-XX:ErrorFile={os.devnull}",
)
# Asks Linux to kill it with its parent, then execs Java. A preexec_fn would do the same between
# fork and exec, which is unsafe with threads.
_TIED = """
import ctypes, os, sys
PR_SET_PDEATHSIG, SIGKILL = 1, 9
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(SIGKILL))
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
_KEPT = 1 << 16
_PROBE_SECONDS = 60.0


class JavaError(RuntimeError):
    """A Java program failed."""


class JavaMissing(JavaError):
    """Java, or a file that the program needs, is missing."""


def find_java() -> str:
    """Return the path of a working Java: from PATH, else from JAVA_HOME.

    Raises JavaMissing with the reason if there is none.
    """
    home = os.environ.get("JAVA_HOME")
    found = [shutil.which("java")]
    if home:
        found.append(shutil.which("java", path=str(Path(home) / "bin")))
    candidates = list(dict.fromkeys(os.path.abspath(path) for path in found if path))
    reasons = []
    for java in candidates:
        try:
            with JavaProgram(
                java, ["-version"], Path(java).parent, "java -version", _PROBE_SECONDS
            ) as it:
                it.feed((), last=True)
                it.rest()
            return java
        except (JavaError, OSError) as error:
            reasons.append(f"{java} does not run: {error}")
    where = "; ".join(reasons) or "there is no java on PATH or in JAVA_HOME/bin"
    raise JavaMissing(f"no Java: {where}; install Java 8 or newer")


class JavaProgram:
    """Context manager that runs a Java program and always ends it on exit.

    If this process is killed, Linux kills the program too; elsewhere it ends when its input closes.
    ``folder`` is the working directory, so arguments can name files in it whatever its path.
    Methods raise TimeoutError once ``time_limit`` seconds have passed since the start, JavaMissing
    if Java does not start or a file of the program is missing, and JavaError if the program fails
    otherwise; messages use ``name`` for the program.
    """

    def __init__(
        self, java: str, arguments: Sequence[str], folder: Path, name: str, time_limit: float
    ) -> None:
        if not time_limit > 0:
            raise ValueError(f"expected time_limit above 0 seconds, got {time_limit}")
        self.name, self.time_limit = name, time_limit
        self.command = [java, *_TRACELESS, *_LOCALE, *arguments]
        if sys.platform == "linux" and sys.executable:
            tied = [sys.executable, "-I", "-S", "-B", "-c", _TIED, str(os.getpid())]
            self.command = tied + self.command
        self.folder = folder
        self.expired = False
        self.errors = b""

    def __enter__(self) -> JavaProgram:
        # Use a new session, so that Ctrl-C reaches only this process, which then ends the program.
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.input, self.output = self.process.stdin, self.process.stdout
        self.timer = threading.Timer(min(self.time_limit, threading.TIMEOUT_MAX), self._expire)
        self.threads: list[threading.Thread] = []
        try:
            self.timer.start()
            self._start(self._drain, self.process.stderr)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.timer.cancel()
        self._kill()
        self.process.wait()
        for thread in self.threads:
            thread.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            _close(pipe)

    def feed(self, lines: Iterable[str], *, last: bool) -> None:
        """Send lines in the background; close the input afterwards if ``last``.

        Lines must not contain line breaks. Lone surrogates become "?".
        """
        text = "\n".join(lines)
        self._start(self._write, text if last else text + "\n", last)

    def line(self) -> str:
        """Read the next line of output."""
        line = self.output.readline()
        if not line.endswith(b"\n"):
            raise self._failure(self._status())
        return line.decode("utf-8", "replace").strip()

    def rest(self) -> str:
        """Wait for the program to succeed and return its remaining output."""
        said = self.output.read()
        if status := self._status():
            raise self._failure(status)
        return said.decode("utf-8", "replace")

    def _status(self) -> int:
        # The program has closed its output; wait for the drain thread to collect its errors.
        status = self.process.wait()
        self.threads[0].join()
        return status

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        thread.start()
        self.threads.append(thread)

    def _write(self, text: str, last: bool) -> None:
        try:
            self.input.write(text.encode("utf-8", "replace"))
            self.input.flush()
            if last:
                self.input.close()
        except BrokenPipeError:
            # The program has ended; the reader reports why.
            return

    def _drain(self, errors: IO[bytes]) -> None:
        while part := errors.read1(_KEPT):  # type: ignore[attr-defined]
            self.errors = (self.errors + part)[-_KEPT:]

    def _expire(self) -> None:
        self.expired = True
        self._kill()

    def _kill(self) -> None:
        # Kill the whole session: java may be a script that starts the real one.
        if os.name != "posix":
            self.process.kill()
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            # The session is already gone.
            self.process.kill()

    def _failure(self, status: int) -> Exception:
        if self.expired:
            return TimeoutError(
                f"{self.name} exceeded the time limit of {self.time_limit:g} seconds: "
                "raise the limit, or score fewer or shorter captions"
            )
        said = self.errors.decode("utf-8", "replace")
        lines = [line.strip("# ") for line in said.splitlines() if line.strip("# ")]
        lines = [line for line in lines if not line.startswith(("Picked up ", "at "))]
        if re.search("OutOfMemoryError|Could not reserve|insufficient memory|too small", said):
            why, kind = "Java has too little memory", JavaError
        elif "UnsupportedClassVersionError" in said:
            why, kind = "this Java is too old", JavaMissing
        elif re.search("Unable to access jarfile|find or load main class|file not found", said):
            why, kind = "one of its files is missing, reinstall pycocoevalcap", JavaMissing
        else:
            why, kind = (
                f"killed by signal {-status}" if status < 0 else f"exit status {status}",
                JavaError,
            )
        if "initialization of VM" in said or "Could not create the Java" in said:
            kind = JavaMissing
        told = next((line for line in lines if "Error" in line or "Exception" in line), None)
        told = told or (lines[-1] if lines else "no output")
        return kind(f"{self.name} failed: {why} ({told[:300]})")


def _environment() -> dict[str, str]:
    """This process's environment with a UTF-8 locale, so that Java finds folders of any name."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    # _JAVA_OPTIONS overrides the command line, so append our options to it.
    if options := environment.get("_JAVA_OPTIONS"):
        environment["_JAVA_OPTIONS"] = " ".join((options, *_TRACELESS, *_LOCALE))
    return environment


def _close(pipe: IO[bytes]) -> None:
    try:
        pipe.close()
    except BrokenPipeError:
        # The program ended before it read all input.
        return

"""Finds the launch configurations of the GPU that it runs on: the best known file after every goal.

Candidates are tried in processes beside each other (`bench.trials`), then timed one after the other
in this one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from math import log
from pathlib import Path
from statistics import fmean, median

import torch

import tokenmix_ops as tm
from bench.candidates import (
    GOALS,
    KERNELS,
    RIVALS,
    Goal,
    candidates,
    chip_of,
    compiled,
    spread_all,
)
from bench.operators import MAIN, OFF, input_sets
from bench.passes import Contender, failure, turn
from bench.pool import Pool
from bench.rows import Row, append_rows
from bench.trials import Trials, forced, using
from tokenmix_ops.backends.triton import configs
from tokenmix_ops.backends.triton.configs import Architecture, Config
from tokenmix_ops.testing import Case
from tokenmix_ops.timing import (
    Clock,
    EventClock,
    Timings,
    device_name,
    environment,
    figures,
    time_in_turn,
)

FINALISTS = 4
TRIAL_SHARE = 0.5
"""Of the time that is left, the most for the trials of the next goal, so that it is timed too."""


def choice(seconds: Mapping[Config, Sequence[float]]) -> list[Config]:
    """Configurations from the best on: by the geometric mean of their times, one for each case."""
    return sorted(seconds, key=lambda config: fmean(map(log, seconds[config])))


def fewest_programs(won: Mapping[int, bool], multiprocessors: int) -> int | None:
    """``programs_per_sm`` from which on the resident backward kernel is used.

    ``won`` says for numbers of programs whether it is the faster way. None if it does not pay.
    """
    lost = [programs for programs, better in won.items() if not better]
    fewest = max(lost) // multiprocessors + 1 if lost else 0
    return fewest if max(won) >= max(1, fewest * multiprocessors) and won[max(won)] else None


def merged(architecture: Architecture, goal: Goal, config: Config | None) -> Architecture:
    """The architecture with the goal's entry replaced; without a ``config``, with none of that
    kernel that would serve the goal's calls.

    Entries stand from the most special to the most general, because the first that fits is used.
    """

    def place(entry: Config | Goal) -> tuple[int, int, int, float]:
        keys = float("inf") if entry.num_keys is None else entry.num_keys
        return (KERNELS.index(entry.kernel), entry.dtype_bits, entry.head_dim, keys)

    def serves(entry: Config) -> bool:
        kernel, bits, head_dim, keys = place(entry)
        wanted = place(goal)
        return (kernel, bits) == wanted[:2] and head_dim >= wanted[2] and keys >= wanted[3]

    if config is None:
        entries = [entry for entry in architecture.configs if not serves(entry)]
    else:
        entries = [entry for entry in architecture.configs if place(entry) != place(goal)]
        entries.append(config)
    return replace(architecture, configs=tuple(sorted(entries, key=place)))


def source(before: str, goals: Iterable[Goal], hardware: str) -> str:
    """What a file says of where its numbers come from, once these goals are reached."""
    rest = before.split("; the rest: ")[-1]
    date = datetime.now(timezone.utc).date().isoformat()
    found = ", ".join(
        f"{goal.kernel} {goal.dtype_bits}/{goal.head_dim}/{goal.num_keys}" for goal in goals
    )
    return f"measured on {hardware}, Triton {version('triton')}, {date}: {found}; the rest: {rest}"


def write(path: Path, architecture: Architecture) -> None:
    """Writes a configuration file, an entry a line; it is replaced as a whole."""
    lines = []
    for config in architecture.configs:
        entry = asdict(config)
        if "resident" not in config.kernel:
            del entry["programs_per_sm"]
        if config.maxnreg is None:
            del entry["maxnreg"]
        if not config.gain_by_frame:
            del entry["gain_by_frame"]
        lines.append(f"    {json.dumps(entry)}")
    text = (
        f'{{\n  "source": {json.dumps(architecture.source)},\n'
        f'  "fastest": {json.dumps(list(architecture.fastest))},\n'
        '  "configs": [\n' + ",\n".join(lines) + "\n  ]\n}\n"
    )
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text)
    unfinished.replace(path)


class Tuner:
    """Tunes goal after goal on one device; ``architecture`` is the best known so far.

    ``log`` gets a row for each candidate and case that is timed, or that cannot be.
    """

    def __init__(
        self,
        architecture: Architecture,
        device: torch.device,
        clock: Clock,
        log: Callable[[Row], object],
    ) -> None:
        self.architecture = architecture
        self.device, self.clock, self.log = device, clock, log
        self.residents: dict[Goal, Config] = {}
        """Entries of resident kernels that were found, by their goals."""

    def tune(self, goal: Goal, able: Sequence[Config]) -> str | None:
        """Takes the fastest of the ``able`` candidates into the architecture; says what came of it,
        None if none could be timed.

        A resident kernel gets no entry if it does not pay, and loses it to a rival that is tuned
        after it and beats it.
        """
        # A GPU that has waited for the trials takes a moment to raise its clock.
        self.times(replace(goal, cases=goal.cases[:1]), able[:1], rounds=101)
        roughly = choice(self.times(goal, spread_all(able), rounds=7))
        kernels = list(dict.fromkeys(map(compiled, roughly)))[:FINALISTS]
        finalists = [config for config in roughly if compiled(config) in kernels]
        times = self.times(goal, finalists, rounds=41)
        if not times:
            return None
        best = choice(times)[0]
        entry: Config | None = best
        if goal.kernel in RIVALS.values():
            entry = self._take_resident(goal, best)
        else:
            self.architecture = merged(self.architecture, goal, best)
            for resident, found in list(self.residents.items()):
                replaces = RIVALS[goal.kernel] == resident.kernel
                if replaces and self._rival(goal.kernel, resident) == best:
                    self._take_resident(resident, found)
        shown = ", ".join(f"{1e3 * s:.4f}" for s in times[best])
        verdict = "" if entry else "; does not pay: no entry"
        return f"{launched(entry or best)}: {shown} ms{verdict}"

    def _take_resident(self, goal: Goal, best: Config) -> Config | None:
        """Enters the best configuration of a resident kernel if and where it beats its rivals."""
        entry: Config | None = best
        if goal.kernel == "fwd_resident":
            entry = best if self._beats(goal, best, "fwd_streamed") else None
        else:
            programs = self._programs_of_backward(goal, best)
            entry = None if programs is None else replace(best, programs_per_sm=programs)
        self.architecture = merged(self.architecture, goal, entry)
        self.residents.pop(goal, None)
        if entry is not None:
            self.residents[goal] = entry
        return entry

    def times(
        self, goal: Goal, candidates: Sequence[Config], rounds: int
    ) -> dict[Config, list[float]]:
        """Median seconds of each candidate in each case; those that fail are left out."""
        found: dict[Config, list[float]] = {config: [] for config in candidates}
        for case in goal.cases:
            contender = self._contender(case, goal.dtype, "triton")
            for config in list(found):
                seconds: list[float] = []
                with using(forced(self.architecture, config)):
                    why = failure(partial(self._time, contender, goal.of_pass, rounds, seconds))
                self._log(goal, config, case, {"reason": why} if why else figures(seconds))
                if why:
                    del found[config]
                else:
                    found[config].append(median(seconds))
        return found

    def _log(self, goal: Goal, config: Config, case: Case, measured: Row) -> None:
        of_case = {**asdict(case), "mixing": repr(case.mixing)}
        about = {"goal": str(goal), "config": asdict(config), "case": of_case}
        self.log({**about, "pass": goal.of_pass, **measured})

    def fastest(self, goal: Goal) -> None:
        """Notes for the goal's dtype and head_dim whether the Triton backend, forward and backward,
        with and without gain, beats the eager one in the goal's first case."""
        kind = {"dtype_bits": goal.dtype_bits, "head_dim": goal.head_dim}
        cases = [replace(goal.cases[0], mixing=mixing) for mixing in (MAIN.mixing, OFF)]
        beaten = all(self._beats_eager(case, goal.dtype) for case in cases)
        rest = [entry for entry in self.architecture.fastest if entry != kind]
        fastest = (*rest, kind) if beaten else (*rest,)
        self.architecture = replace(self.architecture, fastest=fastest)

    def _beats_eager(self, case: Case, dtype: torch.dtype) -> bool:
        turns = {
            name: turn(self._contender(case, dtype, name), "forward + backward")
            for name in ("triton", "eager")
        }
        found: list[Timings] = []

        def time_both() -> None:
            with using(self.architecture):
                time_in_turn(turns, 3, self.clock)
                found.append(time_in_turn(turns, 21, self.clock))

        if failure(time_both):
            return False
        return median(found[0]["triton"]) < median(found[0]["eager"])

    def _rival(self, kernel: str, goal: Goal) -> Config:
        plan = goal.cases[0].plan_on(self.device)
        found = self.architecture.find(kernel, goal.dtype_bits, goal.head_dim, plan.num_keys)
        if found is None:
            raise RuntimeError(f"no configuration of {kernel} to compare with")
        return found

    def _programs_of_backward(self, goal: Goal, best: Config) -> int | None:
        """`fewest_programs` of the resident backward kernel, against the pair of others."""
        (case,) = goal.cases
        won = {}
        for batch in sorted({1, 8, min(16, case.batch), case.batch}):
            smaller = replace(goal, cases=(replace(case, batch=batch),))
            won[batch * case.num_heads] = self._beats(smaller, best, "bwd_query")
        return fewest_programs(won, _multiprocessors(self.device))

    def _beats(self, goal: Goal, best: Config, rival: str) -> bool:
        """Whether what was the best of its kernel is faster than what runs without that kernel."""
        times = self.times(goal, [best, self._rival(rival, goal)], rounds=41)
        if not times:
            raise RuntimeError(f"{best.kernel} and {rival} ran before, and now both fail")
        return choice(times)[0] == best

    def _contender(self, case: Case, dtype: torch.dtype, backend: str) -> Contender:
        plan = case.plan_on(self.device)
        sets = input_sets(case, dtype, self.device.type)
        call = partial(tm.token_mix_attention, mixing=plan, backend=backend)
        return Contender(call, [s[:3] for s in sets], [s[3] for s in sets])

    def _time(self, contender: Contender, of_pass: str, rounds: int, seconds: list[float]) -> None:
        ready = {"": turn(contender, of_pass)}
        time_in_turn(ready, 2, self.clock)
        seconds += time_in_turn(ready, rounds, self.clock)[""]


def launched(config: Config) -> str:
    """A configuration as it is printed."""
    text = f"{config.BLOCK_M} × {config.BLOCK_N}, {config.num_warps} warps"
    text += f", {config.num_stages} stages"
    if config.maxnreg is not None:
        text += f", maxnreg {config.maxnreg}"
    if "resident" in config.kernel:
        text += f", programs_per_sm {config.programs_per_sm}"
    return text


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(
    tuner: Tuner,
    goals: Sequence[Goal],
    able: Callable[[Goal, float], Sequence[Config]],
    deadline: float,
    keep: Callable[[Sequence[Goal]], object],
) -> list[Goal]:
    """Tunes the goals in order until the deadline; calls ``keep`` after each with those done.

    ``able`` returns the candidates of a goal that may be timed, by a moment of `time.monotonic`.
    """
    done: list[Goal] = []
    for goal in goals:
        now = time.monotonic()
        if now > deadline:
            print(f"{goal}: the time was up")
            continue
        candidates = able(goal, now + TRIAL_SHARE * (deadline - now))
        said = tuner.tune(goal, candidates) if candidates else None
        if said is None:
            print(f"{goal}: no candidate is left; the entry stays as it was", flush=True)
            continue
        print(f"{goal}: {said}; {deadline - time.monotonic():.0f} s left", flush=True)
        done.append(goal)
        keep(done)
        if main := settled(goal, goals, done):
            tuner.fastest(main)
            keep(done)
            print(f"fastest: {list(tuner.architecture.fastest)}", flush=True)
    return done


def settled(goal: Goal, goals: Sequence[Goal], done: Sequence[Goal]) -> Goal | None:
    """The first goal of the same dtype and head_dim, if the goal just reached may have changed how
    fast its first case is, and one of each pass that has any is reached; None otherwise."""
    kind = (goal.dtype_bits, goal.head_dim)
    first = next(g for g in goals if (g.dtype_bits, g.head_dim) == kind)
    same = [g for g in goals if (g.dtype_bits, g.head_dim) == kind and first.cases[0] in g.cases]
    wanted, reached = ({g.of_pass for g in same if g in among} for among in (goals, done))
    return first if goal in same and reached == wanted else None


def keeper(tuner: Tuner, path: Path, hardware: str) -> Callable[[Sequence[Goal]], object]:
    """Writes what the tuner knows into a file, each time it is called with the goals done."""
    before = tuner.architecture.source

    def keep(done: Sequence[Goal]) -> None:
        write(path, replace(tuner.architecture, source=source(before, done, hardware)))

    return keep


def tune_this_gpu(
    kernels: Sequence[str], minutes: float, results: Path | None, commit: str | None
) -> Path:
    """Tunes the goals of these kernels on the current GPU; returns the file that was written.

    That is the package's, or one in the folder ``results``, where rows are appended as well; a file
    that is there already is continued. Raises RuntimeError if nothing could be tuned.
    """
    from tokenmix_ops.backends.triton import launch

    start = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    shipped = before = launch.architecture(device)
    path = (results or configs.FOLDER) / f"{shipped.name}.json"
    rows: Path | None = None
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        rows = results / f"tune-{device_name('cuda')}.jsonl"
        before = configs.read(path, shipped.name) if path.exists() else shipped
    elif not os.access(path.parent, os.W_OK):
        raise RuntimeError(f"expected to write into {path.parent}; give --results another folder")
    about = {"suite": "tune", **environment("cuda", commit)}

    def log(row: Row) -> None:
        if rows is not None:
            append_rows(rows, [{**row, **about}])

    chip = chip_of(device)
    goals = [goal for goal in GOALS if goal.kernel in kernels]
    tried = {goal: candidates(goal, (before, shipped), chip) for goal in goals}
    tuner = Tuner(before, device, EventClock(), log)
    keep = keeper(tuner, path, torch.cuda.get_device_name(device))
    # One core is left to this process, one to the rest of the machine.
    with Pool(max(1, min(14, (os.cpu_count() or 1) - 2))) as pool:
        trials = Trials(pool, tried, device, log)
        done = run(tuner, goals, trials.able, start + 60 * minutes, keep)
    if not done:
        raise RuntimeError("nothing could be tuned; the file stays as it was")
    return path

"""Finds the launch configurations of the GPU that it runs on, and writes them into the package.

Candidates are tried in processes beside each other, then timed one after the other in this one.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from itertools import product
from math import log
from pathlib import Path
from statistics import fmean, median

import torch

import tokenmix_ops as tm
from bench.operators import ADJACENT, MAIN, OFF, input_sets
from bench.passes import Contender, failure, turn
from bench.trials import Goal, forced, trial, try_all, using
from tokenmix_ops.backends.triton import configs
from tokenmix_ops.backends.triton.configs import Architecture, Config
from tokenmix_ops.testing import Case
from tokenmix_ops.timing import Clock, EventClock, Timings, time_in_turn

KERNELS = ("fwd_streamed", "fwd_resident", "bwd_query", "bwd_key", "bwd_resident")
"""A resident kernel comes after those that it has to beat."""
FRAMES = replace(MAIN, mixing=ADJACENT)
LARGE = replace(MAIN, batch=16, num_tokens=577)
WIDE = replace(MAIN, batch=32, num_heads=6, head_dim=128)
HALF = (MAIN, replace(MAIN, batch=8), FRAMES)

# In the order of what matters, in case the time is not enough for all.
GOALS = (
    Goal("fwd_streamed", 16, 64, 256, HALF),
    Goal("fwd_resident", 16, 64, 256, HALF),
    Goal("bwd_query", 16, 64, 256, (MAIN, FRAMES)),
    Goal("bwd_key", 16, 64, 256, (MAIN, FRAMES)),
    Goal("bwd_resident", 16, 64, 256, (MAIN,)),
    Goal("fwd_streamed", 16, 64, None, (LARGE,)),
    Goal("bwd_query", 16, 64, None, (LARGE,)),
    Goal("bwd_key", 16, 64, None, (LARGE,)),
    Goal("fwd_streamed", 32, 64, None, (replace(MAIN, batch=16),)),
    Goal("bwd_query", 32, 64, None, (replace(MAIN, batch=16),)),
    Goal("bwd_key", 32, 64, None, (replace(MAIN, batch=16),)),
    Goal("fwd_streamed", 16, 128, None, (WIDE,)),
    Goal("bwd_query", 16, 128, None, (WIDE,)),
    Goal("bwd_key", 16, 128, None, (WIDE,)),
)

# BLOCK_M, BLOCK_N, num_warps, num_stages.
TILES = {
    "fwd_streamed": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "fwd_resident": ((64, 128), (64, 128, 256), (4, 8), (1, 2, 3)),
    "bwd_query": ((64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
    "bwd_key": ((32, 64), (64, 128), (4, 8), (1, 2, 3)),
    "bwd_resident": ((16, 32, 64), (128, 256), (8, 16), (1, 2)),
}
FLOAT32_TILES = ((32, 64), (32, 64), (4, 8), (1, 2))
PROGRAMS_PER_SM = (2, 4, 8, 16)
FINALISTS = 4
TRIAL_SHARE = 0.55
"""Of the time, for compiling; the rest is for timing."""


def candidates(goal: Goal) -> list[Config]:
    """What is tried for a goal."""
    ranges = FLOAT32_TILES if goal.dtype_bits == 32 else TILES[goal.kernel]
    key = (goal.kernel, goal.dtype_bits, goal.head_dim, goal.num_keys)
    return [Config(*key, *tiles) for tiles in product(*ranges)]


def spread(config: Config) -> list[Config]:
    """The ways of dividing the work among programs, which compile to the same code."""
    if config.kernel != "fwd_resident":
        return [config]
    return [replace(config, programs_per_sm=number) for number in PROGRAMS_PER_SM]


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
    """Tunes goal after goal on one device; ``architecture`` is the best known so far."""

    def __init__(self, architecture: Architecture, device: torch.device, clock: Clock) -> None:
        self.architecture = architecture
        self.device, self.clock = device, clock

    def tune(self, goal: Goal, able: Sequence[Config]) -> str:
        """Takes the fastest of the ``able`` candidates into the architecture; says what came of it.

        A resident kernel gets no entry if it does not pay.
        """
        spread_out = [config for tiles in able for config in spread(tiles)]
        roughly = self.times(goal, spread_out, rounds=7)
        finalists = choice(roughly)[:FINALISTS]
        times = self.times(goal, finalists, rounds=41)
        if not times:
            return "no candidate could be timed; the entry stays as it was"
        best = choice(times)[0]
        chosen: Config | None = best
        if goal.kernel == "fwd_resident":
            streamed = self.times(goal, [self._rival("fwd_streamed", goal)], rounds=41)
            chosen = choice({**times, **streamed})[0]
            chosen = chosen if chosen.kernel == goal.kernel else None
        elif goal.kernel == "bwd_resident":
            programs = self._programs_of_backward(goal, best)
            chosen = None if programs is None else replace(best, programs_per_sm=programs)
        self.architecture = merged(self.architecture, goal, chosen)
        shown = ", ".join(f"{1e3 * s:.4f}" for s in times[best])
        verdict = "" if chosen else "; does not pay: no entry"
        launched = f"{best.BLOCK_M} × {best.BLOCK_N}, {best.num_warps} warps"
        launched += f", {best.num_stages} stages"
        if "resident" in goal.kernel:
            launched += f", programs_per_sm {(chosen or best).programs_per_sm}"
        return f"{launched}: {shown} ms{verdict}"

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
                if why:
                    del found[config]
                else:
                    found[config].append(median(seconds))
        return found

    def fastest(self, goals: Iterable[Goal]) -> None:
        """Notes for the dtypes and head_dims of the goals whether the Triton backend, forward and
        backward, with and without gain, beats the eager one."""
        # The first goal of each kind has the main shape.
        of_goals = {(g.dtype_bits, g.head_dim): g for g in reversed(list(goals))}
        fastest = [
            entry
            for entry in self.architecture.fastest
            if (entry["dtype_bits"], entry["head_dim"]) not in of_goals
        ]
        for (bits, head_dim), goal in of_goals.items():
            cases = [replace(goal.cases[0], mixing=mixing) for mixing in (MAIN.mixing, OFF)]
            if all(self._beats_eager(case, goal.dtype) for case in cases):
                fastest.append({"dtype_bits": bits, "head_dim": head_dim})
        self.architecture = replace(self.architecture, fastest=tuple(fastest))

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
            pair = self.times(smaller, [self._rival("bwd_query", goal)], rounds=41)
            resident = self.times(smaller, [best], rounds=41)
            won[batch * case.num_heads] = choice({**pair, **resident})[0] == best
        return fewest_programs(won, _multiprocessors(self.device))

    def _contender(self, case: Case, dtype: torch.dtype, backend: str) -> Contender:
        plan = case.plan_on(self.device)
        sets = input_sets(case, dtype, self.device.type)
        call = partial(tm.token_mix_attention, mixing=plan, backend=backend)
        return Contender(call, [s[:3] for s in sets], [s[3] for s in sets])

    def _time(self, contender: Contender, of_pass: str, rounds: int, seconds: list[float]) -> None:
        ready = {"": turn(contender, of_pass)}
        time_in_turn(ready, 2, self.clock)
        seconds += time_in_turn(ready, rounds, self.clock)[""]


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(
    tuner: Tuner,
    goals: Sequence[Goal],
    able: Mapping[Goal, Sequence[Config]],
    deadline: float,
    keep: Callable[[Sequence[Goal]], object],
) -> list[Goal]:
    """Tunes the goals in order until the deadline; calls ``keep`` after each with those done."""
    done: list[Goal] = []
    for goal in goals:
        left = deadline - time.monotonic()
        if left < 0:
            print(f"{goal}: the time was up")
        elif not able[goal]:
            print(f"{goal}: no candidate is left; the entry stays as it was")
        else:
            print(f"{goal}: {tuner.tune(goal, able[goal])}; {left:.0f} s left", flush=True)
            done.append(goal)
            keep(done)
    return done


def tune_this_gpu(kernels: Sequence[str], minutes: float) -> Path:
    """Tunes the goals of these kernels on the current GPU; returns the file that was written.

    Raises RuntimeError if nothing could be tuned.
    """
    from tokenmix_ops.backends.triton import launch

    start = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    before = launch.architecture(device)
    path = configs.FOLDER / f"{before.name}.json"
    goals = [goal for goal in GOALS if goal.kernel in kernels]
    tasks = [(goal, config, device) for goal in goals for config in candidates(goal)]
    limit = 60 * minutes

    def progress(done: int) -> None:
        if done % 20 == 0 or done == len(tasks):
            left = start + limit * TRIAL_SHARE - time.monotonic()
            print(f"tried {done} of {len(tasks)}; {left:.0f} s left for trials", flush=True)

    processes = max(1, min(14, (os.cpu_count() or 1) - 2))
    answers = try_all(tasks, trial, processes, start + limit * TRIAL_SHARE, progress)
    able = {goal: [c for c in candidates(goal) if not answers[goal, c, device]] for goal in goals}
    for goal in goals:
        why = Counter(answers[goal, c, device] for c in candidates(goal))
        dropped = ", ".join(f"{number} × {text}" for text, number in why.items() if text)
        print(f"{goal}: {len(able[goal])} candidates; dropped: {dropped or 'none'}")

    tuner = Tuner(before, device, EventClock())

    def keep(done: Sequence[Goal]) -> None:
        hardware = torch.cuda.get_device_name(device)
        told = replace(tuner.architecture, source=source(before.source, done, hardware))
        write(path, told)

    done = run(tuner, goals, able, start + limit, keep)
    if not done:
        raise RuntimeError("nothing could be tuned; the file stays as it was")
    tuner.fastest(done)
    keep(done)
    print(f"fastest: {list(tuner.architecture.fastest)}")
    return path

"""What the tuner looks for, and what it tries."""

from dataclasses import replace

import pytest

from bench import candidates as module
from bench.candidates import (
    GOALS,
    KERNELS,
    PROGRAMS_PER_SM,
    RIVALS,
    Chip,
    Goal,
    candidates,
    compiled,
    misfit,
    spread,
)
from bench.operators import MAIN
from tokenmix_ops.backends.triton import configs
from tokenmix_ops.backends.triton.configs import Config

launch = pytest.importorskip("tokenmix_ops.backends.triton.launch")

H100 = Chip()
SHIPPED = configs.load("sm_90")
FORWARD, BACKWARD = GOALS[:2]


def tiles(config):
    return (config.BLOCK_M, config.BLOCK_N, config.num_warps, config.num_stages, config.maxnreg)


@pytest.mark.parametrize("one", GOALS, ids=str)
def test_every_candidate_would_serve_its_goal(one):
    found = candidates(one, [SHIPPED], H100)
    assert len(found) == len(set(map(compiled, found))) > 8
    for case in one.cases:
        num_keys = case.plan.num_keys
        assert all(c.fits(one.kernel, one.dtype_bits, case.head_dim, num_keys) for c in found)


@pytest.mark.parametrize("one", GOALS, ids=str)
def test_what_is_shipped_is_tried_first(one):
    num_keys = one.cases[0].plan.num_keys
    entry = SHIPPED.find(one.kernel, one.dtype_bits, one.head_dim, num_keys)
    if entry is None:  # a new kind of entry
        assert one == Goal("fwd_resident", 16, 64, 640, one.cases)
        return
    first = candidates(one, [SHIPPED], H100)[0]
    assert first == replace(entry, head_dim=one.head_dim, num_keys=one.num_keys)
    # What another file has comes before it, even if it fits nowhere.
    other = replace(entry, BLOCK_M=1024)
    known = (replace(SHIPPED, configs=(other,)), SHIPPED)
    found = candidates(one, known, H100)
    assert [c.BLOCK_M for c in found[:2]] == [1024, entry.BLOCK_M]


def test_the_main_shapes_resident_kernels_come_first():
    assert [goal.kernel for goal in GOALS[:2]] == ["fwd_resident", "bwd_resident"]
    assert all(goal.cases[0] == MAIN for goal in GOALS[:2])
    assert {case.batch for case in FORWARD.cases} >= {64, 16, 8}
    assert set(KERNELS) == set(launch.KERNELS) == {goal.kernel for goal in GOALS}
    assert set(RIVALS) | set(RIVALS.values()) == set(KERNELS)
    # Then the other kernels of its shape, and larger shapes.
    assert [goal.num_keys for goal in GOALS if goal.dtype_bits == 16 and goal.head_dim == 64] == [
        *[256] * 5,
        640,
        *[None] * 3,
    ]


def test_what_the_compiler_speaks_for_is_tried():
    found = [tiles(config) for config in candidates(FORWARD, [SHIPPED], H100)]
    assert {(64, 128, 4, 1, None), (64, 256, 4, 1, 168), (64, 256, 4, 2, 168)} <= set(found[:4])
    assert len(found) <= 40
    assert {config.maxnreg for config in candidates(BACKWARD, [SHIPPED], H100)} == {None}


@pytest.mark.parametrize(
    ("goal", "of_tiles", "chip", "why"),
    [
        (FORWARD, (64, 256, 4, 1, 168), H100, None),
        (FORWARD, (64, 256, 4, 1, 128), H100, "needs 168 registers of 128"),
        (FORWARD, (128, 256, 4, 1), H100, "needs 296 registers of 255"),
        (FORWARD, (128, 256, 4, 1), Chip(tensor_memory=True), None),
        (FORWARD, (64, 256, 8, 1), H100, "has 8 rows for a warp that takes 16"),
        (FORWARD, (64, 256, 4, 1, 168), Chip(99_000), "3 programs need 196608 bytes"),
        (FORWARD, (64, 256, 4, 1), Chip(99_000), None),
        (BACKWARD, (32, 256, 8, 2), H100, None),
        (BACKWARD, (64, 256, 8, 2), H100, None),
        (BACKWARD, (64, 256, 16, 2), H100, "needs 136 registers of 128"),
        (BACKWARD, (128, 256, 8, 2), H100, "needs 296 registers of 255"),
        (GOALS[5], (128, 128, 8, 1), H100, None),
        (GOALS[5], (64, 128, 8, 1), H100, None),
        (GOALS[5], (128, 128, 8, 1), Chip(99_000), "1 programs need 151552 bytes"),
        (GOALS[5], (64, 128, 4, 1, 168), H100, "3 programs need 454656 bytes"),
    ],
)
def test_what_cannot_fit_is_not_tried(goal, of_tiles, chip, why):
    config = Config(goal.kernel, 16, 64, goal.num_keys, *of_tiles)
    found = misfit(goal, config, chip)
    assert found is None if why is None else found.startswith(why)
    tried = map(tiles, candidates(goal, [], chip))
    favoured = [c for c in module.FAVOURED if c.kernel == goal.kernel]
    if goal is FORWARD and tiles(config) in map(tiles, favoured):
        assert tiles(config) in tried
    elif why is not None:
        assert tiles(config) not in tried


def test_only_the_resident_forward_kernel_divides_its_work():
    backward = Config("bwd_key", 16, 64, 256, 64, 64, 4, 2)
    assert spread(backward) == [backward]
    forward = Config("fwd_resident", 16, 64, 256, 64, 64, 4, 2)
    assert [c.programs_per_sm for c in spread(forward)] == list(PROGRAMS_PER_SM)
    shipped = replace(forward, programs_per_sm=6)
    assert [c.programs_per_sm for c in spread(shipped)] == [6, *PROGRAMS_PER_SM]
    assert {compiled(c) for c in spread(shipped)} == {forward}

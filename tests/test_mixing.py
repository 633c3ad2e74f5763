"""Mixings as values, and plans against the definitions, written out once more by hand."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmix_ops import Mixing
from tokenmix_ops.mixing import NAMES
from tokenmix_ops.testing import MIXINGS

layouts = st.tuples(st.integers(1, 9), st.integers(1, 30), st.integers(0, 4)).filter(
    lambda tsp: tsp[1] > tsp[2]
)


@given(layouts)
def test_paper_takes_token_s_from_frame_s_mod_t(layout):
    t, s, p = layout
    plan = Mixing.paper().plan(t, s, p)
    assert plan.key_index.tolist() == [[(token % t) * s + token for token in range(s)]]
    assert plan.num_keys == s
    assert plan.cross_frame_gain == 1.0


@given(layouts)
def test_released_takes_all_prefixes_then_patch_p_from_frame_p_mod_t(layout):
    t, s, p = layout
    plan = Mixing.released().plan(t, s, p)
    keys = [(f, token) for f in range(t) for token in range(p)]
    keys += [(patch % t, p + patch) for patch in range(s - p)]
    assert plan.key_index.tolist() == [[f * s + token for f, token in keys]]
    assert plan.key_frame.tolist() == [[-1] * (t * p) + [patch % t for patch in range(s - p)]]
    assert plan.num_keys == t * p + s - p
    assert plan.cross_frame_gain == 0.8


@given(layouts)
def test_spatial_joint_and_temporal_name_their_own_tokens(layout):
    t, s, p = layout
    assert Mixing.spatial().plan(t, s, p).key_index.tolist() == [
        [f * s + token for token in range(s)] for f in range(t)
    ]
    assert Mixing.joint().plan(t, s, p).key_index.tolist() == [list(range(t * s))]
    assert Mixing.temporal().plan(t, s, p).key_index.tolist() == [
        [f * s + token for f in range(t)] for token in range(s)
    ]


@given(layouts, st.lists(st.integers(-5, 5), min_size=1, max_size=4), st.booleans())
def test_adjacent_takes_patches_of_frames_at_the_offsets(layout, offsets, wrap):
    t, s, p = layout
    plan = Mixing.adjacent(offsets, wrap=wrap).plan(t, s, p)
    for frame in range(t):
        for token in range(s):
            source = frame
            if token >= p:
                source += offsets[(token - p) % len(offsets)]
                source = source % t if wrap else max(0, min(t - 1, source))
            assert plan.key_index[frame, token] == source * s + token
            assert plan.key_frame[frame, token] == (-1 if token < p else source)


@given(layouts, st.sampled_from(NAMES))
def test_presets_name_no_token_twice_and_stay_inside_the_video(layout, name):
    t, s, p = layout
    plan = Mixing.named(name).plan(t, s, p)
    assert all(len(set(row)) == len(row) for row in plan.key_index.tolist())
    assert plan.key_index.min() >= 0
    assert plan.key_index.max() < t * s
    assert plan.key_index.shape == plan.key_frame.shape == (len(plan.key_index), plan.num_keys)


@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_a_mixing_survives_repr_json_pickle_and_hashing(mixing):
    for copy in (
        eval(repr(mixing), {"Mixing": Mixing}),
        Mixing.from_json(mixing.to_json()),
        pickle.loads(pickle.dumps(mixing)),
    ):
        assert copy == mixing
        assert hash(copy) == hash(mixing)
    json.loads(mixing.to_json())
    assert len(set(MIXINGS)) == len(MIXINGS)


def test_what_is_left_out_is_as_in_the_factory():
    assert Mixing("released") == Mixing.released()
    assert Mixing("paper") == Mixing.paper()
    assert Mixing.from_json('{"kind": "released"}') == Mixing.released()
    wrapped = Mixing.from_json('{"kind": "adjacent", "offsets": [2], "wrap": true}')
    assert wrapped == Mixing.adjacent((2,), wrap=True)
    assert '"cross_frame_gain": 1.0' in Mixing.released(cross_frame_gain=1).to_json()
    tables = '{"kind": "from_index", "key_index": "[[0, 3]]", "key_frame": "[[-1, 1]]"}'
    assert Mixing.from_json(tables) == Mixing.from_index([0, 3], [-1, 1])


def test_tables_come_from_whatever_holds_integers():
    mixing = Mixing.from_index([[0, 3], [1, 2]])
    tensor = torch.tensor([[0, 3], [1, 2]])
    for table in (tensor, tensor.numpy(), tensor.int(), ((0, 3), (1, 2))):
        assert Mixing.from_index(table) == mixing


def test_a_plan_is_compiled_once_per_layout_and_device():
    assert Mixing.released().plan(4, 10) is Mixing.released().plan(4, 10, 1, "cpu")
    assert Mixing.released().plan(4, 10) is not Mixing.released().plan(4, 11)


@pytest.mark.interfaces
def test_a_plan_made_inside_a_transform_is_not_kept():
    mixing = Mixing.released(cross_frame_gain=0.123)
    seen = []

    def inside(x):
        seen.append(mixing.plan(4, 9))
        return x.sum()

    torch.func.grad(inside)(torch.ones(3))
    assert mixing.plan(4, 9) is not seen[0]
    with torch.inference_mode():
        kept = Mixing.released(cross_frame_gain=0.124).plan(4, 9)
    assert not kept.key_index.is_inference()
    assert not kept.is_cross_frame.is_inference()


def test_from_index_derives_the_frame_of_each_key():
    plan = Mixing.from_index([0, 1, 7, 5]).plan(2, 5, 1)
    assert plan.rows == "shared"
    assert plan.key_frame.tolist() == [[-1, 0, 1, -1]]
    per_frame = Mixing.from_index(torch.tensor([[0, 1], [9, 9]])).plan(2, 5, 1)
    assert per_frame.rows == "frame"


ERRORS = {
    "no frames": (
        lambda: Mixing.paper().plan(0, 5),
        "num_frames must be at least 1, got 0",
    ),
    "only prefix tokens": (
        lambda: Mixing.paper().plan(2, 3, 3),
        "num_tokens must exceed num_prefix_tokens, which must not be negative; got "
        "num_tokens = 3, num_prefix_tokens = 3",
    ),
    "negative prefix": (
        lambda: Mixing.paper().plan(2, 3, -1),
        "num_tokens must exceed num_prefix_tokens, which must not be negative; got "
        "num_tokens = 3, num_prefix_tokens = -1",
    ),
    "unknown name": (
        lambda: Mixing.named("mixed"),
        "mixing must be a Mixing or one of 'paper', 'released', 'spatial', 'adjacent', 'temporal', "
        "'joint', got 'mixed'",
    ),
    "unknown kind": (
        lambda: Mixing("mixed"),
        "unknown mixing kind 'mixed'; known: paper, released, spatial, adjacent, temporal, joint, "
        "from_index",
    ),
    "gain": (
        lambda: Mixing.released(cross_frame_gain=float("nan")),
        "cross_frame_gain must be finite and not negative, got nan",
    ),
    "gain is a word": (
        lambda: Mixing.paper(cross_frame_gain="0.8"),
        "cross_frame_gain must be a number, got '0.8'",
    ),
    "gain of spatial": (
        lambda: Mixing("spatial", 0.5),
        "a 'spatial' mixing has no cross_frame_gain: it has no other frames",
    ),
    "parameter of another kind": (
        lambda: Mixing("paper", offsets=(1, 2)),
        "a 'paper' mixing has no offsets",
    ),
    "fractions of frames": (
        lambda: Mixing.adjacent((0.5, 1)),
        "offsets must be a sequence of int, got (0.5, 1)",
    ),
    "tables in JSON": (
        lambda: Mixing.from_json('{"kind": "from_index", "key_index": "x"}'),
        "key_index and key_frame must be tables in JSON",
    ),
    "a table of another kind": (
        lambda: Mixing.from_json('{"kind": "paper", "key_index": "[[1]]"}'),
        "a 'paper' mixing has no key_index",
    ),
    "unknown field in JSON": (
        lambda: Mixing.from_json('{"kind": "paper", "gain": 1}'),
        "a mixing has no 'gain'; it has kind, cross_frame_gain, offsets, wrap, key_index, "
        "key_frame",
    ),
    "no JSON": (lambda: Mixing.from_json("oops"), "not a mixing in JSON: oops"),
    "kind in JSON": (
        lambda: Mixing.from_json('{"kind": [1]}'),
        "unknown mixing kind [1]; known: paper, released, spatial, adjacent, temporal, joint, "
        "from_index",
    ),
    "no offsets": (
        lambda: Mixing.adjacent(()),
        "offsets must not be empty in a mixing of kind 'adjacent'",
    ),
    "offsets not a sequence": (
        lambda: Mixing.adjacent(1),
        "offsets must be a sequence of int, got 1",
    ),
    "index beyond the video": (
        lambda: Mixing.from_index([0, 10]).plan(2, 5),
        "key_index names token 10, but a video of 2 frames of 5 tokens ends at 9",
    ),
    "negative index": (
        lambda: Mixing.from_index([0, -1]),
        "key_index must not be negative: frame * num_tokens + token",
    ),
    "rows": (
        lambda: Mixing.from_index([[0], [1], [2]]).plan(2, 5),
        "key_index has 3 rows; it must have one, or num_frames = 2, one a frame",
    ),
    "no keys": (
        lambda: Mixing.from_index([]),
        "key_index must be integers of shape [num_keys] or [num_frames, num_keys], with at least "
        "one key, got shape [0]",
    ),
    "ragged": (
        lambda: Mixing.from_index([[0, 1], [2]]),
        "key_index must be integers of shape [num_keys] or [num_frames, num_keys], got "
        "[[0, 1], [2]]",
    ),
    "not a table": (
        lambda: Mixing.from_index(None),
        "key_index must be integers of shape [num_keys] or [num_frames, num_keys], got None",
    ),
    "floating point": (
        lambda: Mixing.from_index(torch.ones(3)),
        "key_index must be integers of shape [num_keys] or [num_frames, num_keys], got "
        "torch.float32",
    ),
    "key_frame shape": (
        lambda: Mixing.from_index([0, 1, 2], [0, 1]),
        "key_frame must have the shape of key_index, [1, 3], got [1, 2]",
    ),
    "key_frame range": (
        lambda: Mixing.from_index([0, 1], [0, 2]).plan(2, 5),
        "key_frame must lie in -1..1 for a video of 2 frames",
    ),
    "not a mixing": (
        lambda: Mixing.from_json('{"offsets": [1]}'),
        "not a mixing in JSON (an object with 'kind'): {\"offsets\": [1]}",
    ),
}


@pytest.mark.parametrize("wrong", ERRORS)
def test_errors_say_what_is_wrong(wrong, assert_says):
    assert_says(*ERRORS[wrong])


def test_equal_mixings_hash_alike_in_every_process_that_unpickles_them(tmp_path):
    path = tmp_path / "mixing.pickle"
    hash(Mixing.released())
    path.write_bytes(pickle.dumps(Mixing.released()))
    code = (
        "import pickle, sys; from tokenmix_ops import Mixing;"
        "assert pickle.load(open(sys.argv[1], 'rb')) in {Mixing.released()}"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)

"""What plans know of their tables beforehand: the strided rule, and the inverse of the table."""

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmix_ops import Mixing

layouts = st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(0, 3)).filter(
    lambda tsp: tsp[1] > tsp[2]
)


def strided(layout, full, rows):
    """Indices and frames of keys by the rule that `Plan.num_full_tokens` documents."""
    t, s, p = layout
    groups = [range(t)] if rows == "shared" else [[frame] for frame in range(t)]
    index, frame = [], []
    for group in groups:
        keys = [(f, token) for f in group for token in range(full)]
        keys += [(group[i % len(group)], full + i) for i in range(s - full)]
        index.append([f * s + token for f, token in keys])
        frame.append([-1 if token < p else f for f, token in keys])
    return index, frame


def tables(plan):
    return plan.key_index.tolist(), plan.key_frame.tolist()


@given(layouts)
def test_presets_follow_the_strided_rule(layout):
    t, s, p = layout
    wanted = {"paper": 0, "released": p, "joint": s} if t > 1 else {}
    for name in ("paper", "released", "spatial", "joint"):
        plan = Mixing.named(name).plan(t, s, p)
        assert plan.num_full_tokens == wanted.get(name, 0)
        assert tables(plan) == strided(layout, plan.num_full_tokens, plan.rows)
        assert plan.token_order.numel() == plan.use_start.numel() == plan.uses.numel() == 0


@given(st.data(), layouts, st.sampled_from(("shared", "frame")))
def test_num_full_tokens_is_given_where_the_rule_holds_and_nowhere_else(data, layout, rows):
    t, s, p = layout
    index, frame = strided(layout, data.draw(st.integers(0, s)), rows)
    for table, values in ((index, st.integers(0, t * s - 1)), (frame, st.integers(-1, t - 1))):
        if data.draw(st.booleans()):
            row = data.draw(st.sampled_from(table))
            row[data.draw(st.integers(0, len(row) - 1))] = data.draw(values)
    plan = Mixing.from_index(index, frame).plan(t, s, p)
    holds = [n for n in range(s + 1) if strided(layout, n, plan.rows) == (index, frame)]
    assert plan.num_full_tokens == (holds[0] if holds else None)


@st.composite
def tabulated(draw):
    """Plans that do not follow the strided rule, some of whose slots name one token."""
    t, s, _ = layout = draw(layouts)
    if draw(st.booleans()):
        offsets = draw(st.lists(st.integers(-3, 3), min_size=1, max_size=4))
        return Mixing.adjacent(offsets, wrap=draw(st.booleans())).plan(*layout)
    num_rows, num_keys = draw(st.sampled_from((1, t))), draw(st.integers(1, 12))
    row = st.lists(st.integers(0, t * s - 1), min_size=num_keys, max_size=num_keys)
    index = draw(st.lists(row, min_size=num_rows, max_size=num_rows))
    return Mixing.from_index(index).plan(*layout)


@given(tabulated().filter(lambda plan: plan.num_full_tokens is None))
def test_uses_are_the_inverse_of_the_table(plan):
    slots = plan.key_index.flatten().tolist()
    start, uses = plan.use_start.tolist(), plan.uses.tolist()
    num_tokens = plan.num_frames * plan.num_tokens
    assert len(start) == num_tokens + 1
    assert (start[0], start[-1]) == (0, len(slots))
    for token in range(num_tokens):
        wanted = [slot for slot, named in enumerate(slots) if named == token]
        assert uses[start[token] : start[token + 1]] == wanted


@given(tabulated().filter(lambda plan: plan.num_full_tokens is None))
def test_tokens_of_the_same_rows_stand_side_by_side_and_unused_ones_last(plan):
    order = plan.token_order.tolist()
    assert sorted(order) == list(range(plan.num_frames * plan.num_tokens))
    rows = plan.key_index.tolist()
    users = [tuple(r for r, row in enumerate(rows) for key in row if key == t) for t in order]
    runs = [key for key, _ in groupby(users)]
    assert len(runs) == len(set(runs))
    assert () not in runs[:-1]


@pytest.mark.parametrize("name", ["paper", "released", "spatial", "adjacent", "temporal", "joint"])
def test_no_tables_are_made_where_no_gradient_needs_them(name):
    plan = Mixing.named(name).plan(3, 7)
    needed = name == "adjacent"
    assert (plan.num_full_tokens is None) == (name in ("adjacent", "temporal"))
    for table in (plan.token_order, plan.use_start, plan.uses):
        assert (table.numel() > 0) == needed

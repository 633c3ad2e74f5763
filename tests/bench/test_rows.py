"""Result files survive being written, and two of them are compared."""

import pytest

from bench.rows import Keeper, compare, read_rows, update_rows, write_rows

ABOUT = {"suite": "layer", "device": "cpu", "pass": "forward", "torch": "2.12.0", "commit": "a"}
OLD = [
    {**ABOUT, "contender": "triton", "rounds_ms": [2.0, 2.2, 1.9], "median_ms": 2.0},
    {**ABOUT, "contender": "flex", "rounds_ms": [4.0], "median_ms": 4.0},
    {**ABOUT, "contender": "gone", "rounds_ms": [4.0], "median_ms": 4.0},
    {**ABOUT, "contender": "xformers", "reason": "xformers is not installed"},
]


def test_rows_survive_their_file_and_a_broken_line_is_named(tmp_path):
    path = tmp_path / "results" / "layer-cpu.jsonl"
    write_rows(path, OLD)
    assert read_rows(path) == OLD
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(ValueError, match=r"layer-cpu.jsonl, line 5: "):
        read_rows(path)


def test_rows_of_other_names_stay(tmp_path):
    path = tmp_path / "world-cpu.jsonl"
    update_rows(path, OLD, ("contender",))
    found = update_rows(path, [{**OLD[1], "median_ms": 5.0}], ("contender",))
    assert found == read_rows(path)
    assert [row.get("median_ms") for row in found] == [2.0, 5.0, 4.0, None]


def test_a_keeper_writes_after_each_part(tmp_path):
    keep = Keeper(tmp_path / "a.jsonl", {"commit": "b"})
    for number in range(2):
        keep([{"number": number}])
        assert read_rows(keep.path) == keep.rows
    assert keep.rows == [{"number": 0, "commit": "b"}, {"number": 1, "commit": "b"}]


def test_two_files_are_compared_row_by_row():
    newer = {"torch": "2.13.0", "commit": "b"}
    new = [{**OLD[0], **newer, "rounds_ms": [1.0], "relative_error": {"output": 1e-3}}]
    new += [{**OLD[1], **newer, "rounds_ms": [8.0], "ratio_quartiles": [1, 2]}]
    new += [{**OLD[1], **newer, "contender": "came", "rounds_ms": [8.0]}]
    lines = compare(OLD, new).splitlines()
    assert lines[2:] == [
        "| contender triton | 2 ms | 1 ms | 2.000× |",
        "| contender flex | 4 ms | 8 ms | 0.500× |",
        "",
        "- only in the old file: contender gone, pass forward, suite layer",
        "- only in the new file: contender came, pass forward, suite layer",
        "- torch: 2.12.0 → 2.13.0",
        "- commit: a → b",
    ]

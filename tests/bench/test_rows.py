"""Result files survive being written, and two of them are compared."""

import pytest

from bench.rows import (
    Keeper,
    append_rows,
    compare,
    latest,
    read_rows,
    repair,
    update_rows,
    whole_rows,
    write_rows,
)

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
        "- only in the old file: contender gone",
        "- only in the new file: contender came",
        "- torch: 2.12.0 → 2.13.0",
        "- commit: a → b",
    ]


def test_rows_are_called_by_the_fewest_keys_that_tell_them_apart():
    rows = [
        {
            "contender": who,
            "shape": shape,
            "batch": batch,
            "width": {"model": batch},
            "rounds_ms": [1],
        }
        for who in ("triton", "flex")
        for shape, batch in (("main", 64), ("B = 16", 16))
    ]
    assert [line.split(" | ")[0] for line in compare(rows, rows).splitlines()[2:]] == [
        f"| contender {who}, shape {shape}"
        for who in ("triton", "flex")
        for shape in ("main", "B = 16")
    ]


def test_what_cannot_be_compared_is_refused_in_a_sentence():
    for new, text in (
        ([{**OLD[0], "suite": "gpu"}], "expected two files of the same suite, got layer and gpu"),
        ([{**OLD[0], "contender": "came"}], "got none of the old one's rows"),
        (OLD[3:], "got none in the new one"),
        ([], "got none in the new one"),
    ):
        with pytest.raises(ValueError, match=text):
            compare(OLD, new)


def test_appended_rows_survive_a_half_line(tmp_path):
    path = tmp_path / "a.jsonl"
    assert repair(path) == 0
    append_rows(path, OLD[:2])
    assert repair(path) == 0
    half = '{"contender": "fl…'
    path.write_text(path.read_text() + half)
    assert repair(path) == len(half.encode())
    append_rows(path, OLD[2:])
    assert read_rows(path) == OLD


def test_lines_of_processes_that_died_are_left_out(tmp_path):
    path = tmp_path / "rows"
    append_rows(path, OLD[:1])
    path.write_text(path.read_text() + '{"contender": "fl')
    append_rows(path, OLD[1:])
    append_rows(path, OLD[1:])
    assert whole_rows(path) == [*OLD[:1], *OLD[2:], *OLD[1:]]


def test_a_repeated_race_replaces_the_earlier_one_if_anything_was_timed():
    def race(stage, of_pass, *timed):
        about = {"part": "operator", "shape": "main", "stage": stage, "pass": of_pass}
        return [
            {
                **about,
                "contender": name,
                **({"median_ms": 1.0} if name in timed else {"reason": ""}),
            }
            for name in ("triton", "flex")
        ]

    other = [{"part": "stage", "stage": "main"}, {"part": "stage", "stage": "again"}]
    forward = [race("main", "forward", "triton", "flex"), race("again", "forward", "triton")]
    backward = [race("main", "backward", "triton"), race("again", "backward")]
    rows = [*other, *forward[0], *backward[0], *forward[1], *backward[1]]
    assert latest(rows) == [*other, *backward[0], *forward[1]]
    # Unless it lost what is ours.
    rows = [*forward[0], *race("again", "forward", "flex")]
    assert latest(rows) == forward[0]
    assert latest(OLD) == OLD

"""Tables of a folder's result files, without a page."""

import pytest

from bench import __main__ as command
from bench.rows import write_rows
from bench.tables.gpu import REHEARSED


def test_every_result_file_is_shown_and_none_is_changed(tmp_path, capsys):
    about = {"part": "operator", "shape": "main", "pass": "forward", "hardware": "a CPU"}
    rows = [
        {**about, "contender": name, "median_ms": 1.0, "rounds_ms": [1.0], "floor_ms": 0.5}
        for name in ("triton", "eager")
    ]
    rehearsal = tmp_path / "rehearsal-cpu.jsonl"
    write_rows(rehearsal, [{**row, "rehearsal": True} for row in rows])
    (tmp_path / "tune-h100.jsonl").write_text("no table is made of these")
    before = rehearsal.read_bytes()
    command.main(["report", "--results", str(tmp_path)])
    shown = capsys.readouterr().out
    assert str(rehearsal) in shown
    assert "| main | forward | 1 | 50% | 1.00× |" in shown
    assert REHEARSED in shown
    assert rehearsal.read_bytes() == before


def test_the_targets_of_a_cpu_come_last(tmp_path, capsys):
    about = {"part": "operator", "shape": "main", "pass": "forward", "hardware": "a CPU"}
    about |= {"torch": "2.13.0", "tokenmix_ops": "0.1.0", "commit": "0123456789", "gflop": 2.0}
    row = {**about, "date": "2026-11-27", "median_ms": 1.0, "rounds_ms": [1.0]}
    rows = [{**row, "contender": name} for name in ("cpu", "product")]
    write_rows(tmp_path / "operator-cpu-avx2.jsonl", rows)
    command.main(["report", "--results", str(tmp_path)])
    shown = capsys.readouterr().out
    last = shown[shown.index("targets-cpu-avx2\n") :]
    assert "of the rate of a matrix product | 100% (100%–100%) | ≥ 95% | met |" in last
    assert "targets-cpu\n" not in shown


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(SystemExit, match=f"^bench report: expected result files in {tmp_path}, "):
        command.main(["report", "--results", str(tmp_path)])

"""The command as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import gpu, layers, tables
from bench import rows as files
from bench.rows import read_rows
from tokenmix_ops import timing

ROOT = Path(command.__file__).parent.parent
NAMES = (
    *("operator", "layer", "host", "gpu", "training", "memory", "rerank", "loading", "world"),
    *("search", "aot", "tune", "render", "compare"),
)
BARE = """
import runpy, sys
for name in ("av", "rich", "tyro", "transformers", "matplotlib", "triton"):
    sys.modules[name] = None
from bench.__main__ import main
for name in {names}:
    try:
        main([name, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
main(["render", "--check"])
main(["compare", "results/layer-cpu.jsonl", "results/layer-cpu.jsonl"])
import bench.operators, bench.layers, bench.gpu
main(["loading"])
"""


@pytest.mark.parametrize("name", NAMES)
def test_every_subcommand_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"Example: python -m bench {name}" in " ".join(capsys.readouterr().out.split())


def test_the_command_lists_all_subcommands(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in NAMES)


def test_what_a_subcommand_does_not_need_may_be_missing():
    done = subprocess.run(
        [sys.executable, "-c", BARE.format(names=NAMES)], cwd=ROOT, capture_output=True, text=True
    )
    assert "1.000×" in done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("bench loading: needs av: pip install")


@pytest.mark.parametrize(
    "arguments", [["gpu"], ["tune"], ["training"], ["operator"], ["host"]], ids=" ".join
)
def test_programs_say_that_they_need_a_gpu(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command.main([*arguments, "--results", str(tmp_path)])
    needs = "needs a CUDA GPU, and this machine has none"
    assert stopped.value.code == f"bench {arguments[0]}: {needs}"
    assert list(tmp_path.iterdir()) == []


def test_red_tests_stop_the_benchmark(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "device_name", lambda device: "h200")
    monkeypatch.setattr(timing, "environment", lambda device, commit: {})
    monkeypatch.setattr(gpu, "run_tests", lambda log: False)
    with pytest.raises(
        SystemExit, match=r"bench gpu: the tests fail, so nothing is measured; see .*tests.log"
    ):
        command.main(["gpu", "--results", str(tmp_path)])


def test_a_mistake_is_one_sentence(tmp_path):
    for arguments, text in (
        (["compare", str(tmp_path / "a"), str(tmp_path / "b")], "No such file"),
        (["operator", "--device", "cpu", "--shapes", "none"], "expected shapes among B = 2"),
        (["render", "--pages", str(tmp_path / "no.md")], "No such file"),
    ):
        with pytest.raises(SystemExit, match=f"bench {arguments[0]}: .*{text}"):
            command.main(arguments)


def test_a_layer_is_measured_into_its_file(tmp_path, monkeypatch, capsys):
    real = layers.layer_rows
    small = {"num_frames": 4, "num_tokens": 10, "num_heads": 2, "dim": 16}
    monkeypatch.setattr(layers, "layer_rows", lambda *a, **k: real(*a, **k, **small))
    command.main(["layer", "--device", "cpu", "--rounds", "3", "--results", str(tmp_path)])
    rows = read_rows(tmp_path / "layer-cpu.jsonl")
    assert {row["device"] for row in rows} == {"cpu"}
    assert {row["suite"] for row in rows} == {"layer"}
    assert tables.layer_table(rows) in capsys.readouterr().out


def test_choices_are_those_of_the_programs():
    pytest.importorskip("transformers")
    pytest.importorskip("av")
    pytest.importorskip("pycocoevalcap")
    from bench import aot, tune, world

    assert tuple(world.CONTENDERS) == command.METHODS
    assert tuple(aot.ARCHITECTURES) == command.ARCHITECTURES
    assert tune.KERNELS == command.KERNELS


def test_layers_are_compared_with_results_of_before(tmp_path, capsys):
    old = files.read_rows(ROOT / "results" / "layer-cpu.jsonl")
    new = [{**row, "quartiles_ms": [1, 2], "relative_error": {"output": 1e-6}} for row in old]
    files.write_rows(tmp_path / "new.jsonl", new)
    command.main(["compare", str(ROOT / "results/layer-cpu.jsonl"), str(tmp_path / "new.jsonl")])
    assert capsys.readouterr().out.count("1.000×") == len(old)

"""The command as a user types it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import arguments, layers, operators
from bench import rows as files
from bench.lease import PLAN, REHEARSAL, Lease
from bench.rows import read_rows
from bench.tables.speed import layer_table

ROOT = Path(command.__file__).parent.parent
NAMES = (
    *(
        "operator",
        "layer",
        "tower",
        "host",
        "lease",
        "training",
        "memory",
        "rerank",
        "loading",
        "world",
    ),
    *("search", "aot", "cache", "tune", "render", "report", "compare"),
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
import bench.operators, bench.layers, bench.gpu, bench.lease
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
    "arguments", [["tune"], ["training"], ["operator"], ["host"]], ids=" ".join
)
def test_programs_say_that_they_need_a_gpu(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command.main([*arguments, "--results", str(tmp_path)])
    assert stopped.value.code.startswith(f"bench {arguments[0]}: needs a CUDA GPU, and PyTorch ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "seconds", "plan"), [([], 585.0, PLAN), (["--dry-run"], 585.0, REHEARSAL)]
)
def test_a_lease_that_went_wrong_says_what(arguments, seconds, plan, monkeypatch, tmp_path):
    def run(self):
        assert (self.results, self.seconds, self.plan) == (tmp_path, seconds, plan)
        self.left_out = ["tune: exit status 1"]

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(Lease, "run", run)
    with pytest.raises(SystemExit, match="bench lease: not as planned: tune: exit status 1"):
        command.main(["lease", "--results", str(tmp_path), *arguments])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_lease_may_be_interrupted(number, monkeypatch, tmp_path):
    monkeypatch.setattr(Lease, "run", lambda self: signal.raise_signal(number))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        command.main(["lease", "--results", str(tmp_path)])
    assert stopped.value.code == 130
    assert signal.getsignal(number) == before


def test_a_lease_under_nohup_outlives_its_terminal(monkeypatch, tmp_path):
    monkeypatch.setattr(Lease, "run", lambda self: signal.raise_signal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command.main(["lease", "--results", str(tmp_path)])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_mistake_is_one_sentence(tmp_path):
    for words, text in (
        (["compare", str(tmp_path / "a"), str(tmp_path / "b")], "No such file"),
        (
            ["operator", "--device", "cpu", "--shapes", "none"],
            "expected shapes among 'main', 'main, gain off'",
        ),
        (["render", "--pages", str(tmp_path / "no.md")], "No such file"),
    ):
        with pytest.raises(SystemExit, match=f"bench {words[0]}: .*{text}"):
            command.main(words)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["layer", "--batch", "0"], "--batch: expected a whole number of at least 1, got '0'"),
        (["layer", "--rounds", "0"], "--rounds: expected a whole number of at least 1"),
        (["operator", "--seconds", "nan"], "--seconds: expected a number above 0, got 'nan'"),
        (["rerank", "--texts", "-1"], "--texts: expected a whole number of at least 1"),
        (["loading", "--clips", "0"], "--clips: expected a whole number of at least 1"),
        (["tune", "--minutes", "0"], "--minutes: expected a number above 0"),
        (["aot", "--head-dims", "512"], "--head-dims: expected a number from 1 to 256, got '512'"),
        (["aot", "out"], "unrecognized arguments: out"),
    ],
)
def test_a_mistyped_word_shows_how_its_own_subcommand_is_used(words, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"usage: python -m bench {words[0]} [-h]")
    assert text in shown


def test_a_part_of_the_shapes_does_not_replace_all(tmp_path):
    names = [shape.name for shape in operators.CPU_SHAPES]
    path = tmp_path / "operator-cpu.jsonl"
    files.write_rows(path, [{"shape": name} for name in names])
    with pytest.raises(SystemExit, match=r"operator-cpu.jsonl would lose .*shapes: 1.* --results"):
        command.main(
            ["operator", "--device", "cpu", "--shapes", names[0], "--results", str(tmp_path)]
        )
    assert len(read_rows(path)) == len(names)


@pytest.mark.parametrize("name", ["layer", "operator", "host", "training"])
def test_nothing_is_measured_for_a_folder_that_cannot_be_written(name, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit, match=f"bench {name}: cannot write to the folder {file}"):
        command.main([name, "--device", "cpu", "--results", str(file / "results")])


def test_some_kernels_do_not_replace_the_archive_of_all(monkeypatch):
    kernel_calls = pytest.importorskip("bench.kernel_calls", exc_type=ImportError)
    monkeypatch.setattr(kernel_calls, "refusal", lambda: None)
    with pytest.raises(SystemExit, match="expected --archive with --calls"):
        command.main(["cache", "--calls", "host"])


def test_nothing_is_compiled_for_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    kernel_calls = pytest.importorskip("bench.kernel_calls", exc_type=ImportError)
    monkeypatch.setattr(kernel_calls, "refusal", lambda: None)
    file = tmp_path / "file"
    file.write_text("")
    for options in (
        ["--folder", str(file / "cache"), "--archive", str(tmp_path / "a")],
        ["--folder", str(tmp_path / "cache"), "--archive", str(file / "a")],
    ):
        with pytest.raises(SystemExit, match=f"bench cache: cannot write to the folder {file}"):
            command.main(["cache", "--calls", "host", *options])


def test_an_archive_stays_if_nothing_could_be_compiled(monkeypatch, tmp_path, capsys):
    kernel_calls = pytest.importorskip("bench.kernel_calls", exc_type=ImportError)
    monkeypatch.setattr(kernel_calls, "refusal", lambda: None)
    monkeypatch.setattr(kernel_calls, "compile_all", lambda *_: (set(), {"host": "no disk"}))
    archive = tmp_path / "cache.tar.xz"
    archive.write_text("before")
    with pytest.raises(SystemExit, match="bench cache: not compiled:\nhost: no disk"):
        command.main(
            [
                *("cache", "--calls", "host", "--archive", str(archive)),
                *("--folder", str(tmp_path / "cache")),
            ]
        )
    assert archive.read_text() == "before"
    assert capsys.readouterr().out == ""


def test_a_reader_that_has_seen_enough_is_no_error():
    file = str(ROOT / "results" / "layer-cpu.jsonl")
    running = subprocess.Popen(
        [sys.executable, "-m", "bench", "compare", file, file],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    running.stdout.close()
    assert running.stderr.read() == b""
    assert running.wait() == 141


def test_a_layer_is_measured_into_its_file(tmp_path, monkeypatch, capsys):
    real = layers.layer_rows
    small = {"num_frames": 4, "num_tokens": 10, "num_heads": 2, "dim": 16}
    monkeypatch.setattr(layers, "layer_rows", lambda *a, **k: real(*a, **k, **small))
    command.main(["layer", "--device", "cpu", "--rounds", "3", "--results", str(tmp_path)])
    rows = read_rows(tmp_path / "layer-cpu.jsonl")
    assert {row["device"] for row in rows} == {"cpu"}
    assert {row["suite"] for row in rows} == {"layer"}
    shown = capsys.readouterr().out
    assert layer_table(rows) in shown
    # Pages are rendered from another folder.
    assert shown.endswith(f"\nrows: {tmp_path / 'layer-cpu.jsonl'}\n")


def test_choices_are_those_of_the_programs():
    pytest.importorskip("transformers")
    pytest.importorskip("av")
    pytest.importorskip("pycocoevalcap")
    from bench import aot, isa, tune, world

    assert tuple(world.CONTENDERS) == arguments.METHODS
    assert tuple(aot.ARCHITECTURES) == arguments.ARCHITECTURES
    assert tune.KERNELS == arguments.KERNELS
    assert tuple(isa.VARIABLES) == arguments.ISAS


def test_layers_are_compared_with_results_of_before(tmp_path, capsys):
    old = files.read_rows(ROOT / "results" / "layer-cpu.jsonl")
    new = [{**row, "quartiles_ms": [1, 2], "relative_error": {"output": 1e-6}} for row in old]
    files.write_rows(tmp_path / "new.jsonl", new)
    command.main(["compare", str(ROOT / "results/layer-cpu.jsonl"), str(tmp_path / "new.jsonl")])
    assert capsys.readouterr().out.count("1.000×") == len(old)

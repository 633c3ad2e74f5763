"""The command as a user types it: help, exit statuses, JSON, and the demo in small."""

import json

import pytest
import torch

from tokenmix_ops import backends, peer_layers
from tokenmix_ops.backends import cpu
from tokenmix_ops.video import cli
from tokenmix_ops.video import demo as demonstration
from tokenmix_ops.video.data.shapes import write_world
from tokenmix_ops.video.demo import motion

ON_KERNEL = cpu.unavailable() is None and len(cpu.instruction_sets()[1]) > 1


def run(capsys, *arguments):
    """(exit status, standard output, standard error) of ``tokenmix`` with the arguments."""
    status = 0
    try:
        cli.main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    if isinstance(status, str):
        return 1, captured.out, captured.err + status
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    "command", [["demo"], ["explain"], ["bench"], ["data", "shapes"]], ids=" ".join
)
def test_every_command_has_help_with_an_example(capsys, command):
    status, out, _ = run(capsys, *command, "--help")
    assert status == 0
    assert f"Example: tokenmix {' '.join(command)}" in " ".join(out.split())


@pytest.mark.interfaces
def test_explain(capsys):
    status, out, _ = run(capsys, "explain", "--json")
    assert status == 0
    assert json.loads(out) == backends.machine_report()
    assert "eager: can run" in run(capsys, "explain")[1]


def test_explain_names_the_instruction_set_of_the_cpu_kernel(capsys, monkeypatch):
    monkeypatch.setattr(backends.cpu, "description", lambda: "uses fast")
    line = "CPU kernel: uses fast\n"
    for reason in (None, "not built: no luck"):
        monkeypatch.setattr(backends.cpu, "unavailable", lambda reason=reason: reason)
        out = run(capsys, "explain")[1]
        assert (line in out) == (reason is None)
        assert f"cpu: {reason or 'can run'}\n" in out


def test_explain_says_what_the_environment_requests(capsys, monkeypatch):
    monkeypatch.setenv("TOKENMIX_BACKEND", "eager")
    assert "TOKENMIX_BACKEND requests 'eager' for every call\n" in run(capsys, "explain")[1]


@pytest.mark.interfaces
def test_shapes_writes_a_world(capsys, tmp_path):
    status, out, _ = run(
        capsys, "data", "shapes", str(tmp_path / "w"), "--videos", "2", "--size", "32"
    )
    assert status == 0
    names = ("annotations.json", "videos.jsonl")
    assert out.split() == [str(tmp_path / "w" / name) for name in names]
    assert len(list((tmp_path / "w" / "videos").iterdir())) == 2


def test_a_mistake_is_one_sentence(capsys, tmp_path):
    status, out, err = run(capsys, "data", "shapes", str(tmp_path), "--size", "33")
    assert (status, out) == (1, "")
    assert err.strip().splitlines()[-1].startswith("tokenmix: size must be even, got 33")
    assert "rounds must be at least 1, got 0" in run(capsys, "bench", "--rounds", "0")[2]


@pytest.fixture
def quick(monkeypatch):
    """Layers of the timed size take minutes under test; smaller ones show the same."""
    small = {"batch": 1, "num_frames": 8, "num_tokens": 18, "dim": 24}
    for module in (peer_layers, demonstration):
        monkeypatch.setattr(module, "LAYER_SHAPE", small)


def test_bench_prints_and_writes_only_what_it_is_asked_to(capsys, tmp_path, quick, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "bench", "--rounds", "2")
    assert status == 0
    kept = [name for name in peer_layers.LAYER_TITLES if ON_KERNEL or not name.startswith("eager_")]
    assert all(peer_layers.LAYER_TITLES[name] in out for name in kept)
    assert out.splitlines()[-1] == peer_layers.about_backend()
    assert list(tmp_path.iterdir()) == []
    status, out, _ = run(capsys, "bench", "--rounds", "1", "--json", "--out", "layer.jsonl")
    assert (tmp_path / "layer.jsonl").read_text() == out
    rows = [json.loads(line) for line in out.splitlines()]
    assert {row["contender"] for row in rows} == set(kept)
    assert all({"hardware", "torch", "commit", "rounds_ms"} <= row.keys() for row in rows)


def test_the_demo_runs_to_its_end_and_fails_if_mixing_has_not_learnt(capsys, tmp_path, quick):
    status, _, err = run(
        capsys,
        *("demo", "--json", "--out", str(tmp_path), "--steps", "2", "--clips", "8"),
        *("--rounds", "1"),
    )
    assert status == 1
    assert "train longer with --steps (now 2)" in " ".join(err.split())
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert figures["clips"]["read"] == 8
    assert figures["clips"]["psnr_db"] > 30
    assert figures["reversal"]["spatial"]["frames_equal"]
    assert figures["reversal"]["spatial"]["pooled_relative_difference"] < 1e-6
    assert not figures["reversal"]["released"]["frames_equal"]
    assert figures["reversal"]["released"]["pooled_relative_difference"] > 1e-3
    assert set(figures["accuracy"]) == {"spatial", "released"}
    assert ("eager_token_mixing" in figures["layer_ms"]["forward"]) == ON_KERNEL
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_on_own_files_leaves_out_what_it_cannot_read(capsys, tmp_path, quick):
    write_world(tmp_path / "own", 2, size=32)
    (tmp_path / "own" / "broken.mp4").write_bytes(b"not a video")
    arguments = ["demo", "--json", "--out", str(tmp_path / "out"), "--rounds", "1", "--videos"]
    status, out, _ = run(capsys, *arguments, str(tmp_path / "own"))
    assert status == 0
    figures = json.loads(out)
    assert figures["clips"]["read"] == 2
    assert len(figures["clips"]["unreadable"]) == 1
    assert "accuracy" not in figures
    assert (tmp_path / "out" / "demo.png").exists()
    (tmp_path / "empty").mkdir()
    for folder, text in (("empty", "expected video files"), ("none", "is not a folder: pass")):
        status, _, err = run(capsys, *arguments, str(tmp_path / folder))
        assert status == 1
        assert text in err


def test_training_depends_on_the_seed_alone():
    losses = []
    for _ in range(2):
        torch.manual_seed(len(losses))
        losses.append(motion.train(motion.build("released"), 3))
    assert losses[0] == losses[1]


def test_an_error_in_one_tower_ends_the_other(monkeypatch, tmp_path):
    from rich.console import Console

    real = motion.train

    def train(model, steps, **arguments):
        if "released" in repr(model):
            raise RuntimeError("broken")
        return real(model, steps, **arguments)

    monkeypatch.setattr(motion, "train", train)
    with pytest.raises(RuntimeError, match="broken"):
        demonstration._train(10**6, torch.rand(1, 8, 3, 56, 56), {}, Console(stderr=True))

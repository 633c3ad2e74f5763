"""Training and what follows it, as a user types it: figures, files, sentences, exit statuses."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace

import huggingface_hub.constants
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tokenmix_ops.video import cli
from tokenmix_ops.video.data.manifest import read_manifest, write_manifest
from tokenmix_ops.video.experiments import captioning_task, evaluating
from tokenmix_ops.video.metrics.captions import FIGURES, CaptionScores

COMMANDS = {"caption": "captioning", "retrieval": "retrieval"}
OWN = {
    "caption": ("--num-beams", "2", "--max-length", "8"),
    "retrieval": ("--queue-size", "24", "--rerank", "2"),
}
# As in training: METEOR takes a Java and seconds.
SCORED = {"caption": ("--score-tokenizer", "python", "--no-meteor"), "retrieval": ()}


@pytest.fixture(autouse=True)
def on_one_core_and_offline(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokenmix(capsys):
    """(exit status, standard output, standard error) of ``tokenmix`` with the arguments."""

    def run(*arguments):
        status = 0
        capsys.readouterr()
        try:
            cli.main(list(map(str, arguments)))
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        if isinstance(status, str):
            return 1, captured.out, captured.err + status
        return status, captured.out, captured.err

    return run


@pytest.fixture
def refused(tokenmix):
    """The one sentence with which a command ends that cannot be done."""

    def run(*arguments):
        status, out, err = tokenmix(*arguments)
        assert (status, out) == (1, "")
        assert "Traceback" not in err
        sentence = re.sub(r"Loading weights:.*\r?", "", err).strip()
        assert sentence.startswith("tokenmix: ")
        assert "\n" not in sentence
        return sentence.removeprefix("tokenmix: ")

    return run


@pytest.fixture(scope="module")
def training(experiment_folder):
    """Arguments of a training of two updates."""

    def arguments(command, out, *more, **replaced):
        flags = {
            "data": experiment_folder / "world" / "videos.jsonl",
            "model": experiment_folder / COMMANDS[command],
            "num-frames": 2,
            "image-size": 32,
            "batch-size": 4,
            "learning-rate": 1e-3,
            "workers": 0,
            "max-steps": 2,
            **{name.replace("_", "-"): value for name, value in replaced.items()},
        }
        listed = [part for n, v in flags.items() if v is not None for part in (f"--{n}", v)]
        return [command, "train", "--out", out, *OWN[command], *listed, *more]

    return arguments


@pytest.fixture(scope="module")
def trained(tmp_path_factory, training):
    """Folders of a captioner's and of a retriever's training."""
    folder = tmp_path_factory.mktemp("trained")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    for command in COMMANDS:
        cli.main(list(map(str, training(command, folder / command))))
    return folder


@pytest.fixture(scope="module")
def data(experiment_folder):
    return experiment_folder / "world" / "videos.jsonl"


@pytest.fixture
def altered(data, tmp_path):
    """The data, changed by a function of a list of videos; its paths start from the same root."""

    def write(change):
        return write_manifest(tmp_path / "altered.jsonl", change(list(read_manifest(data).videos)))

    return write


@pytest.mark.interfaces
@pytest.mark.parametrize("command", COMMANDS)
def test_training_prints_and_writes_what_came_out(tokenmix, training, tmp_path, command):
    out = tmp_path / "run"
    status, printed, err = tokenmix(*training(command, out, "--json"))
    assert status == 0
    figures = json.loads(printed)
    assert figures == json.loads((out / "figures.json").read_text())
    assert figures["updates"] == 2
    assert figures["best"] == figures["last"]
    assert "update 2 of 2" in err
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["update", "update", "evaluation"]
    assert load_file(out / "best.safetensors").keys() == load_file(out / "last.safetensors").keys()
    assert yaml.safe_load((out / "experiment.yaml").read_text())["task"] == COMMANDS[command]
    # Once more: it says so, and does nothing.
    before = (out / "log.jsonl").read_text()
    status, printed, _ = tokenmix(*training(command, out, "--resume"))
    assert status == 0
    assert f"{out} is finished, after 2 updates" in printed
    assert str(out / "best.safetensors") in printed
    assert (out / "log.jsonl").read_text() == before


@pytest.mark.interfaces
@pytest.mark.parametrize("command", COMMANDS)
def test_the_experiment_file_of_a_run_repeats_it(tokenmix, trained, tmp_path, command):
    config = trained / command / "experiment.yaml"
    status, out, _ = tokenmix(command, "train", "--config", config, "--out", tmp_path, "--json")
    assert status == 0
    assert json.loads(out) == json.loads((trained / command / "figures.json").read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_tiny_needs_data_alone(tokenmix, data, tmp_path, command):
    flags = ("--num-frames", 2, "--max-steps", 1, "--batch-size", 2, *OWN[command])
    status, out, _ = tokenmix(
        command, "train", "--tiny", "--data", data, "--out", tmp_path / "run", *flags
    )
    assert status == 0
    assert "best.safetensors" in out
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    best = moved / "best.safetensors"
    flags = ("--data", data, "--workers", 0, "--json", *SCORED[command])
    status, out, _ = tokenmix(command, "evaluate", best, *flags)
    assert status == 0
    if command == "caption":
        assert set(json.loads(out)) == {*FIGURES, "tokenizer", "videos"}
        assert json.loads(out)["METEOR"] is None
    else:
        assert {"t2v R@1", "v2t MedR", "rsum"} <= set(json.loads(out))


@pytest.mark.parametrize("command", COMMANDS)
def test_evaluating_gives_the_figures_of_the_training(tokenmix, trained, data, command):
    figures = json.loads((trained / command / "figures.json").read_text())["best"]
    best = trained / command / "best.safetensors"
    flags = ("--data", data, "--split", "val", "--workers", 0, *SCORED[command])
    status, out, _ = tokenmix(command, "evaluate", best, *flags, "--json")
    assert status == 0
    found = {name: value for name, value in json.loads(out).items() if value is not None}
    assert found.pop("videos") == 2
    if command == "caption":
        assert found.pop("tokenizer") == figures["tokenizer"] == "tokenmix_ops' own"
    assert found == pytest.approx({name: figures[name] for name in found}, rel=1e-6)
    status, out, _ = tokenmix(command, "evaluate", best, *flags)
    assert status == 0
    for name, value in found.items():
        assert re.search(rf"{re.escape(name)} +{value:.2f}\b", out), out


@pytest.mark.interfaces
@pytest.mark.parametrize("command", COMMANDS)
def test_an_exported_model_is_as_good_as_the_checkpoint(tokenmix, trained, data, tmp_path, command):
    best, whole = trained / command / "best.safetensors", tmp_path / "whole"
    assert tokenmix(command, "export", best, whole)[:2] == (0, f"{whole}\n")
    flags = ("--data", data, "--workers", 0, "--json", *SCORED[command])
    same = ("--num-beams", 3) if command == "caption" else ("--rerank", 4)
    results = [tokenmix(command, "evaluate", path, *flags, *same) for path in (best, whole)]
    assert [status for status, _, _ in results] == [0, 0]
    # A checkpoint brings the longest caption with it, a whole model has the default.
    if command == "retrieval":
        assert json.loads(results[0][1]) == pytest.approx(json.loads(results[1][1]))


def test_exporting_does_not_write_onto_a_file(refused, trained):
    best = trained / "caption" / "best.safetensors"
    assert str(best) in refused("caption", "export", best, best)


def test_evaluating_writes_captions(tokenmix, trained, data, tmp_path):
    best, file = trained / "caption" / "best.safetensors", tmp_path / "new" / "captions.json"
    flags = ("--data", data, "--workers", 0, "--num-beams", 1, "--out", file, *SCORED["caption"])
    assert tokenmix("caption", "evaluate", best, *flags)[0] == 0
    rows = json.loads(file.read_text())
    assert {row["image_id"] for row in rows} == {"video9", "video19"}
    assert all(row["caption"] for row in rows)


def test_captions_are_scored_against_references_as_they_are(
    tokenmix, training, trained, data, tmp_path, altered, monkeypatch
):
    long = 'The man\'s "dog" ' + "runs and " * 20 + "barks: (loudly)!"
    some = altered(lambda videos: [replace(v, captions=(long,)) for v in videos])
    seen = []

    def score(predictions, references, **how):
        seen.append({name: list(captions) for name, captions in references.items()})
        return CaptionScores({"CIDEr": 1.0, "BLEU-4": 1.0}, "a tokenizer")

    for module in (captioning_task, evaluating):
        monkeypatch.setattr(module, "caption_scores", score)
    where = {"data": some, "root": data.parent}
    assert tokenmix(*training("caption", tmp_path / "run", **where))[0] == 0
    flags = ("--data", some, "--root", data.parent, "--split", "val", "--workers", 0)
    assert tokenmix("caption", "evaluate", trained / "caption" / "best.safetensors", *flags)[0] == 0
    assert seen == [{"video8": [long], "video18": [long]}] * 2


def test_without_scorers_nothing_is_begun(
    refused, tokenmix, training, trained, data, tmp_path, monkeypatch
):
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    wanted = "caption scores need 'pycocoevalcap"
    sentence = refused(*training("caption", tmp_path / "run"))
    assert sentence.startswith(wanted)
    assert "pip install 'tokenmix_ops[metrics]'" in sentence
    assert not (tmp_path / "run" / "log.jsonl").exists()
    assert refused("caption", "evaluate", tmp_path / "none", "--data", data).startswith(wanted)
    assert tokenmix(*training("caption", tmp_path / "other", select_on="none"))[0] == 0
    good = data.parent / "videos" / "video0.mp4"
    best = trained / "caption" / "best.safetensors"
    assert tokenmix("caption", "predict", best, good)[0] == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_evaluations_show_how_far_they_are(tokenmix, trained, data, monkeypatch, command):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    best = trained / command / "best.safetensors"
    flags = ("--data", data, "--workers", 0, "--json", *SCORED[command])
    status, out, err = tokenmix(command, "evaluate", best, *flags)
    assert status == 0
    assert json.loads(out)
    steps = ("videos", "re-ranking") if command == "retrieval" else ("captions",)
    for step in steps:
        assert f"{step} of test" in err
    assert "training" not in err


def test_predicting_has_a_precision_of_its_own(tokenmix, trained, data, tmp_path, monkeypatch):
    best, other = trained / "caption" / "best.safetensors", tmp_path / "other.safetensors"
    with safe_open(best, "pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["settings"])
    settings["training"]["precision"] = "bf16"
    save_file(load_file(best), other, {**metadata, "settings": json.dumps(settings)})
    seen = []

    def started(settings, own=evaluating.start_accelerator):
        seen.append(settings.precision)
        return own(settings)

    monkeypatch.setattr(evaluating, "start_accelerator", started)
    good = data.parent / "videos" / "video0.mp4"
    for flags in ((), ("--precision", "bf16")):
        assert tokenmix("caption", "predict", other, good, *flags)[0] == 0
    assert seen == ["no", "bf16"]


@pytest.mark.parametrize("command", COMMANDS)
def test_frames_and_size_of_a_whole_model(
    tokenmix, refused, trained, experiment_folder, data, command
):
    whole = experiment_folder / COMMANDS[command]
    flags = ("--data", data, "--workers", 0, *SCORED[command])
    small = ("--image-size", 32, "--num-frames", 3)
    assert tokenmix(command, "evaluate", whole, *flags, *small)[0] == 0
    best = trained / command / "best.safetensors"
    own = ("--image-size", 32, "--num-frames", 2)
    assert tokenmix(command, "evaluate", best, *flags, *own)[0] == 0
    for flag, was, given in (("--image-size", 32, 48), ("--num-frames", 2, 3)):
        assert refused(command, "evaluate", best, *flags, flag, given) == (
            f"{best} was trained with {flag} {was}, got {given}: leave it out"
        )
    sentence = refused(command, "evaluate", whole, *flags, "--model", whole)
    assert sentence == f"{whole} is a whole model: leave --model {whole} out"
    if command == "caption":
        good = data.parent / "videos" / "video0.mp4"
        assert tokenmix("caption", "predict", whole, good, *small)[0] == 0


def test_predicting_goes_on_after_a_file_that_cannot_be_read(tokenmix, trained, data, tmp_path):
    good = data.parent / "videos" / "video0.mp4"
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"not a video")
    best = trained / "caption" / "best.safetensors"
    status, out, err = tokenmix("caption", "predict", best, good, bad, good, tmp_path / "none.mp4")
    assert status == 1
    lines = out.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"{good}: ")
    problems = [line for line in err.splitlines() if line.startswith("tokenmix: ")]
    assert str(bad) in problems[0]
    assert "none.mp4" in problems[1]
    assert problems[2] == "tokenmix: 2 of 4 videos could not be captioned"
    status, out, _ = tokenmix("caption", "predict", best, good, bad, "--json")
    assert status == 1
    rows = list(map(json.loads, out.splitlines()))
    assert [row["video"] for row in rows] == [str(good), str(bad)]
    assert rows[0]["error"] is None
    assert rows[0]["captions"] == [lines[0].partition(": ")[2]]
    assert rows[1]["captions"] == []
    assert str(bad) in rows[1]["error"]


def test_several_captions(tokenmix, trained, data):
    good, best = data.parent / "videos" / "video0.mp4", trained / "caption" / "best.safetensors"

    def captions(*flags):
        status, out, _ = tokenmix("caption", "predict", best, good, "--json", *flags)
        assert status == 0
        return json.loads(out)["captions"]

    assert len(set(captions("--num-captions", 3))) == 3
    assert captions("--num-captions", 3, "--num-beams", 2)[0] == captions("--num-beams", 3)[0]
    drawn = captions("--top-p", 0.95, "--num-captions", 4)
    assert len(set(drawn)) > 1
    assert drawn == captions("--top-p", 0.95, "--num-captions", 4)
    assert drawn != captions("--top-p", 0.95, "--num-captions", 4, "--seed", 1)


def test_predicting_what_cannot_be(refused, tokenmix, trained, data):
    good, best = data.parent / "videos" / "video0.mp4", trained / "caption" / "best.safetensors"
    assert "top_p is 2.0" in refused("caption", "predict", best, good, "--top-p", 2)
    assert "num_beams is 0" in refused("caption", "predict", best, good, "--num-beams", 0)
    assert "num_captions" in refused("caption", "predict", best, good, "--num-captions", 0)
    assert "no videos given" in refused("caption", "predict", best)


def test_a_checkpoint_of_the_other_task(refused, trained, data, tmp_path):
    best = trained / "retrieval" / "best.safetensors"
    wanted = f"{best}: expected task captioning, got retrieval"
    good = data.parent / "videos" / "video0.mp4"
    assert wanted in refused("caption", "predict", best, good)
    assert wanted in refused("caption", "evaluate", best, "--data", data)
    assert wanted in refused("caption", "export", best, tmp_path / "whole")
    none = tmp_path / "none.safetensors"
    assert f"{none} does not exist" in refused("caption", "predict", none, good)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_was_moved(
    refused, tokenmix, training, experiment_folder, data, tmp_path, command
):
    home, new = tmp_path / "model", tmp_path / "elsewhere"
    shutil.copytree(experiment_folder / COMMANDS[command], home)
    out = tmp_path / "run"
    assert tokenmix(*training(command, out, model=home, select_on="none"))[0] == 0
    home.rename(new)
    flags = ("--data", data, "--workers", 0, *SCORED[command])
    evaluate = (command, "evaluate", out / "last.safetensors", *flags)
    sentence = refused(*evaluate)
    assert str(home) in sentence
    assert "--model" in sentence
    assert tokenmix(*evaluate, "--model", new)[0] == 0
    # Another model than the one that was tuned is told by its frozen weights.
    other = tmp_path / "other"
    shutil.copytree(new, other)
    weights = load_file(other / "model.safetensors")
    changed = {name: value + 0.1 for name, value in weights.items()}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    assert "was tuned on other weights" in refused(*evaluate, "--model", other)


def test_a_named_tokenizer_goes_with_the_checkpoint(
    tokenmix, refused, training, experiment_folder, data, tmp_path
):
    words, home, new = tmp_path / "words", tmp_path / "model", tmp_path / "elsewhere"
    shutil.copytree(experiment_folder / "captioning", home)
    words.mkdir()
    for file in home.glob("tokenizer*"):
        file.rename(words / file.name)
    out = tmp_path / "run"
    named = {"model": home, "tokenizer": words, "select_on": "none"}
    assert tokenmix(*training("caption", out, **named))[0] == 0
    home.rename(new)
    good = data.parent / "videos" / "video0.mp4"
    last = out / "last.safetensors"
    assert tokenmix("caption", "predict", last, good, "--model", new)[0] == 0
    moved = words.rename(tmp_path / "moved")
    for command in (
        ("predict", last, good),
        ("evaluate", last, "--data", data, "--workers", 0, *SCORED["caption"]),
        ("export", last, tmp_path / "whole"),
    ):
        assert str(words) in refused("caption", *command, "--model", new)
        assert tokenmix("caption", *command, "--model", new, "--tokenizer", moved)[0] == 0


def test_a_checkpoint_with_settings_of_another_version(refused, trained, data, tmp_path):
    best, newer = trained / "caption" / "best.safetensors", tmp_path / "newer.safetensors"
    with safe_open(best, "pt") as file:
        metadata = file.metadata()
    settings = {**json.loads(metadata["settings"]), "warp": 9}
    save_file(load_file(best), newer, {**metadata, "settings": json.dumps(settings)})
    sentence = refused("caption", "evaluate", newer, "--data", data)
    assert sentence.startswith(f"{newer}: warp is not a setting")


def test_a_model_named_from_here_is_found_from_here(
    tokenmix, training, experiment_folder, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(experiment_folder)
    out = tmp_path / "run"
    assert tokenmix(*training("caption", out, model="./captioning", select_on="none"))[0] == 0
    last = out / "last.safetensors"
    assert tokenmix("caption", "predict", last, data.parent / "videos" / "video0.mp4")[0] == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_is_not_there(refused, training, tmp_path, command):
    for name in ("Salesforce/blip-image-captioning-base", "no/such", str(tmp_path / "none")):
        sentence = refused(*training(command, tmp_path / "run", model=name))
        assert name in sentence
        assert "Salesforce publishes BLIP" in sentence
        assert "--model" in sentence
        assert "--tiny" in sentence
    original = tmp_path / "blip.pth"
    original.write_bytes(b"cut off")
    assert str(original) in refused(*training(command, tmp_path / "run", model=original))


def test_starting_again_and_going_on_with_something_else(
    refused, tokenmix, training, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    sentence = refused(*training("caption", out, "--resume"))
    assert f"{out} holds no training to resume" in sentence
    assert tokenmix(*training("caption", out, select_on="none"))[0] == 0
    assert "pass --resume" in refused(*training("caption", out, select_on="none"))
    for changes, text in (
        ({"method": "spatial"}, "tuning.method was token_mixing and is spatial"),
        ({"learning_rate": 0.5}, "training.learning_rate was 0.001 and is 0.5"),
        ({"max_steps": 3}, "training.max_steps was 2 and is 3"),
    ):
        changed = training("caption", out, "--resume", **{"select_on": "none", **changes})
        sentence = refused(*changed)
        assert f"{out} holds another experiment: {text}; pass the same" in sentence
    sentence = refused(*training("retrieval", out, "--resume", select_on="none"))
    assert "experiment.yaml: expected task retrieval, got captioning" in sentence
    # What it was begun with need not be said again, nor where, if it is there by default.
    assert tokenmix("caption", "train", "--out", str(out), "--resume")[0] == 0
    out.rename(tmp_path / "captioning")
    (tmp_path / "runs").mkdir()
    (tmp_path / "captioning").rename(tmp_path / "runs" / "captioning")
    monkeypatch.chdir(tmp_path)
    assert tokenmix("caption", "train", "--resume")[0] == 0
    (tmp_path / "runs" / "captioning").rename(out)
    assert tokenmix(*training("caption", out, "--resume", select_on="none", workers=1))[0] == 0


def test_data_that_is_not_there(refused, training, data, tmp_path, altered):
    out = tmp_path / "run"
    sentence = refused(*training("caption", out, data=None))
    assert "pass --data" in sentence
    assert "tokenmix data shapes" in sentence
    assert "none.jsonl" in refused(*training("caption", out, data=tmp_path / "none.jsonl"))
    sentence = refused(*training("caption", out, root=tmp_path))
    assert "16 of 16 videos of split 'train' are not there" in sentence
    assert "--root" in sentence
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "splits with videos are: none" in refused(*training("caption", out, data=empty))
    empty.write_text("{\n")
    assert f"{empty}, line 1: is not JSON" in refused(*training("caption", out, data=empty))
    alone = altered(lambda videos: [v for v in videos if v.split == "train"])
    where = {"data": alone, "root": data.parent}
    sentence = refused(*training("retrieval", out, **where))
    assert "--select-on" in sentence
    assert "--select-on none" in sentence
    sentence = refused(*training("retrieval", out, batch_size=999, **where, select_on="none"))
    assert "fewer than one update's 999" in sentence
    assert not (out / "log.jsonl").exists()


def test_a_split_without_captions_is_told_before_the_training(
    refused, training, trained, data, tmp_path, altered
):
    some = altered(lambda videos: [replace(v, captions=()) if v.split == "val" else v
                                   for v in videos])  # fmt: skip
    for command in COMMANDS:
        sentence = refused(*training(command, tmp_path / "run", data=some, root=data.parent))
        wanted = "2 of 2 videos of split 'val' have no captions to compare with: video8, video18"
        assert sentence == wanted
        assert not (tmp_path / "run").exists()
        best = trained / command / "best.safetensors"
        where = ("--data", some, "--root", data.parent, "--split", "val", "--workers", 0)
        assert "split 'val'" in refused(command, "evaluate", best, *where)


def test_settings_that_cannot_be(refused, tokenmix, training, tmp_path):
    out = tmp_path / "run"
    for command, flag, text in (
        ("caption", {"epochs": 0}, "epochs is 0"),
        ("caption", {"top_p": 2}, "top_p is 2"),
        ("retrieval", {"rerank": -1}, "rerank is -1"),
        ("retrieval", {"drop_path": 1}, "drop_path is 1"),
    ):
        status, printed, err = tokenmix(*training(command, out, **flag))
        assert (status, printed) == (2, "")
        assert text in " ".join(err.split())
    assert "nothing to train" in refused(*training("caption", out, method="frozen"))
    assert "multiple of the patch size" in refused(*training("caption", out, image_size=33))
    assert "fp16 needs a GPU" in refused(*training("retrieval", out, precision="fp16"))
    assert "one: start more" in refused(*training("retrieval", out, "--fsdp"))
    assert "layer" in refused(*training("retrieval", out, "--layers", 7))
    assert "max_length is 99, more than the 64 positions" in refused(
        *training("caption", out, max_length=99)
    )
    assert "max_tokens is 65" in refused(*training("retrieval", out, max_tokens=65))
    assert "temperature must be" in refused(*training("retrieval", out, temperature=3))


def test_a_clip_that_a_worker_cannot_read_ends_the_training(refused, training, data, tmp_path):
    world = tmp_path / "world"
    shutil.copytree(data.parent, world)
    bad = world / "videos" / "video0.mp4"
    bad.write_bytes(b"not a video")
    out = tmp_path / "run"
    for workers in (0, 1):
        given = training(
            "caption", out / str(workers), data=world / "videos.jsonl", workers=workers,
            max_steps=8, save_every=1, max_unreadable=0.0,
        )  # fmt: skip
        sentence = refused(*given)
        assert sentence.startswith("1 of 16 videos could not be read")
        assert f"--max-unreadable allows; last error: {bad}: " in sentence


@pytest.mark.interfaces
@pytest.mark.parametrize(
    "words",
    [
        ("caption", "train"),
        ("caption", "evaluate"),
        ("caption", "predict"),
        ("caption", "export"),
        ("retrieval", "train"),
        ("retrieval", "evaluate"),
        ("retrieval", "export"),
    ],
    ids=" ".join,
)
def test_help_has_an_example_and_explains_every_flag(tokenmix, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = tokenmix(*words, "--help")
    assert status == 0
    assert f"Example: tokenmix {' '.join(words)} " in " ".join(out.split())
    # Boxes one below the other: a flag's text is beside it, or on the next line.
    assert "││" not in out
    rows = [line.strip("│ ") for line in out.splitlines()]
    flags = [index for index, row in enumerate(rows) if re.match(r"--?[a-z]", row)]
    assert len(flags) >= 2
    for index in flags:
        beside = re.split(r"\s{2,}", rows[index], maxsplit=1)[1:] or [rows[index + 1]]
        said = re.sub(r"\((default|required|optional).*", "", beside[0])
        assert re.search(r"[A-Za-z]{2}", said), rows[index]
        assert not said.startswith("-"), rows[index]

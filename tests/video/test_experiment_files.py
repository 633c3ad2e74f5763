"""Experiment files: those that are shipped, round trips, and what is wrong in one."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tokenmix_ops.video import cli
from tokenmix_ops.video.engine.settings import Training
from tokenmix_ops.video.experiments.files import as_yaml, plain, read_experiment
from tokenmix_ops.video.experiments.settings import (
    Captioning,
    Contrast,
    Decoding,
    Retrieval,
    Videos,
)
from tokenmix_ops.video.tuning.settings import Tuning

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml"))

# The recipe, typed anew: dataset to (epochs, beams), backbone to what its size asks for.
CAPTIONING = {"msvd": (6, 3), "msrvtt": (5, 5), "vatex": (5, 5)}
RETRIEVAL = ("msrvtt", "lsmdc")
BACKBONES = {"vit-b16": ("base", 16, 0.0), "vit-l16": ("large", 8, 0.1)}
WHOLE = ("adapter", "bitfit", "dual_attention", "full", "lora", "st_adapter", "temporal")
MIXERS = ("spatial", "token_mixing")
METHODS = {
    **{name: (name, None) for name in WHOLE},
    **{f"{name}-p": (name, None) for name in MIXERS},
    **{f"{name}-f": (name, True) for name in MIXERS},
}


def test_every_experiment_of_the_paper_has_a_file():
    sets = {"captioning": CAPTIONING, "retrieval": RETRIEVAL}
    wanted = {
        Path(task, dataset, backbone, f"{method}.yaml")
        for task, datasets in sets.items()
        for dataset in datasets
        for backbone in BACKBONES
        for method in METHODS
    }
    assert set(FILES) == wanted


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_is_the_recipe_and_a_delta(file):
    task, dataset, backbone, method = (*file.parts[:3], file.stem)
    size, batch, drop_path = BACKBONES[backbone]
    read = plain(read_experiment(CONFIGS / file, task))
    name, everything = METHODS[method]
    tuning, training = read["tuning"], read["training"]
    assert (tuning["method"], tuning["everything"]) == (name, everything)
    rest = {"temporal_position": False, "mixing": "released", "rank": 8}
    assert {k: v for k, v in tuning.items() if k not in ("method", "everything")} == {
        **dict.fromkeys(tuning.keys() - {"method", "everything"}), **rest
    }  # fmt: skip
    assert read["drop_path"] == drop_path
    assert read["videos"] == {
        "data": None, "root": None, "num_frames": 8, "image_size": 224, "select_on": "val",
        "strict": False, "max_unreadable": 0.1, "fps": None, "cache": None, "cache_gib": 50.0,
    }  # fmt: skip
    assert (read["tiny"], read["tokenizer"]) == (False, None)
    for setting, value in {
        "learning_rate": 1e-5, "weight_decay": 0.05, "schedule": "epoch_cosine",
        "warmup_steps": 0, "accumulation": 1, "max_grad_norm": None, "max_steps": None,
        "fsdp": False, "precision": "no",
    }.items():  # fmt: skip
        assert training[setting] == value, setting
    # What updates all of ViT-L does not fit otherwise.
    assert training["gradient_checkpointing"] == (
        size == "large" and (name == "full" or everything is True)
    )
    if task == "captioning":
        epochs, beams = CAPTIONING[dataset]
        assert read["model"] == f"Salesforce/blip-image-captioning-{size}"
        assert (training["epochs"], training["batch_size"]) == (epochs, batch)
        assert read["decoding"] == {
            "num_beams": beams, "min_length": 5, "max_length": 32, "top_p": None
        }  # fmt: skip
        assert read["max_tokens"] == 40
    else:
        assert read["model"] == f"Salesforce/blip-itm-{size}-coco"
        assert (training["epochs"], training["batch_size"]) == (6, 8)
        assert read["contrast"] == {
            "queue_size": 57600, "momentum": 0.995, "alpha": 0.4, "temperature": 0.07
        }  # fmt: skip
        assert (read["max_tokens"], read["rerank"]) == (35, 128)

    def superfluous(delta, default):
        for setting, value in delta.items():
            inside = isinstance(value, dict)
            # The method is said even where it is the default: it is what the file is about.
            if setting == "method":
                continue
            if superfluous(value, default[setting]) if inside else value == default[setting]:
                return setting

    delta = yaml.safe_load((CONFIGS / file).read_text())
    kind = {"captioning": Captioning, "retrieval": Retrieval}[delta.pop("task")]
    assert superfluous(delta, plain(kind())) is None


def settings(kind, **some):
    """Any value of a dataclass that its own check lets pass."""
    return st.builds(kind, **{f.name: some[f.name] for f in fields(kind) if f.name in some})


paths = st.none() | st.text("ab. /é", min_size=1).map(Path)
words = st.text() | st.sampled_from(["null", "yes", "1e5", "~", "- a", "#", "a: b", "x" * 200])
switches = st.none() | st.booleans()
many = st.integers(1, 10**6)
amounts = st.floats(1e-12, 1e6)
videos = settings(
    Videos,
    data=paths,
    root=paths,
    num_frames=many,
    select_on=st.sampled_from(["val", "none"]),
    strict=st.booleans(),
    max_unreadable=st.floats(0, 0.99),
    cache=paths,
    fps=st.none() | st.floats(0.1, 60),
    cache_gib=st.floats(0.1, 1e4),
)
tunings = settings(
    Tuning,
    method=st.sampled_from(["token_mixing", "lora"]),
    everything=switches,
    layers=st.none() | st.lists(st.integers(-12, 23), max_size=4).map(tuple),
    mixing=words,
    bottleneck=st.none() | many,
    temporal_position=st.booleans(),
)
trainings = settings(
    Training,
    epochs=many,
    learning_rate=amounts,
    weight_decay=amounts,
    precision=st.sampled_from(["no", "bf16"]),
    max_grad_norm=st.none() | amounts,
    max_steps=st.none() | many,
)
shared = dict(
    videos=videos,
    model=words,
    tokenizer=st.none() | words,
    tiny=st.booleans(),
    tuning=tunings,
    training=trainings,
)
experiments = st.builds(
    Captioning, **shared, decoding=settings(Decoding, num_beams=many, top_p=st.just(0.9))
) | st.builds(Retrieval, **shared, contrast=settings(Contrast, temperature=amounts, alpha=amounts))


@given(experiment=experiments)
def test_what_is_printed_reads_back(tmp_path_factory, experiment):
    path = tmp_path_factory.getbasetemp() / "experiment.yaml"
    path.write_text(as_yaml(experiment), encoding="utf-8")
    again = read_experiment(path)
    assert again == experiment
    assert types(again) == types(experiment)


def types(value):
    if is_dataclass(value):
        return {field.name: types(getattr(value, field.name)) for field in fields(value)}
    return type(value), tuple(map(type, value)) if isinstance(value, tuple) else ()


WRONG = {
    "task: captioning\nlearning_rate: 1.0": "learning_rate is not a setting; there are videos",
    "task: captioning\ntraining: {rate: 1.0}": "training.rate is not a setting; there are epochs",
    "task: captioning\ntraining: {epochs: many}": "training.epochs must be int, got 'many'",
    "task: captioning\ntraining: {epochs: 1.5}": "training.epochs must be int, got 1.5",
    "task: captioning\ntraining: {epochs: true}": "training.epochs must be int, got True",
    "task: captioning\ntraining: {epochs: 0}": "epochs is 0, it must be at least 1",
    "task: captioning\ntraining: {learning_rate: fast}": "learning_rate must be float, got 'fast'",
    "task: captioning\ntraining: 3": "training must hold settings, got 3",
    "task: captioning\ntraining:": "training must hold settings, got None",
    "task: captioning\ndecoding: {num_beams: 0}": "num_beams is 0, it must be at least 1",
    "task: captioning\ndecoding: {top_p: 2.0}": "top_p is 2.0, it must be above 0 and at most 1",
    "task: captioning\ndecoding: {min_length: 9, max_length: 8}": "min_length is 9, more than",
    "task: captioning\ndrop_path: -0.1": "drop_path is -0.1, it must be at least 0 and below 1",
    "task: retrieval\nrerank: -1": "rerank is -1, it must be at least 0",
    "task: retrieval\ntuning: {method: magic}": "tuning.method must be 'token_mixing' or",
    "task: retrieval\ntuning: {layers: [a]}": "tuning.layers must be a list of int or null",
    "task: retrieval\ntuning: {everything: 1}": "tuning.everything must be bool or null, got 1",
    "task: retrieval\ndecoding: {num_beams: 3}": "decoding is not a setting",
    "task: retrieval\n1: 2": "1 is not a setting",
    "task: cooking": "must hold a line task: captioning or task: retrieval",
    "task: [captioning]": "must hold a line task: captioning or task: retrieval",
    "- task": "must hold a line task: captioning or task: retrieval",
    "": "must hold a line task: captioning or task: retrieval",
    "task: {": "is not YAML: while parsing",
    "task: \0": "is not YAML",
    "? [a]\n: b": "is not YAML",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named_with_the_file(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_experiment(path)
    assert str(error.value).startswith(str(path))
    assert WRONG[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_the_other_task_or_of_other_bytes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("task: retrieval")
    with pytest.raises(ValueError, match=r"mine.yaml is of task retrieval, wanted captioning"):
        read_experiment(path, "captioning")
    path.write_bytes(b"task: caf\xe9")
    with pytest.raises(ValueError, match=r"mine.yaml is not YAML"):
        read_experiment(path)
    with pytest.raises(OSError, match=r"none.yaml"):
        read_experiment(tmp_path / "none.yaml")


def test_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("task: captioning\ntraining: {learning_rate: 1e-4, weight_decay: 0}")
    training = read_experiment(path).training
    assert (training.learning_rate, training.weight_decay) == (1e-4, 0.0)
    assert type(training.weight_decay) is float


def test_no_without_quotes_is_no(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("task: captioning\ntraining: {precision: no}")
    assert read_experiment(path).training.precision == "no"
    path.write_text("task: captioning\ntraining: {precision: yes}")
    with pytest.raises(ValueError, match="precision must be 'no' or"):
        read_experiment(path)


def printed(capsys, *arguments):
    cli.main([*arguments, "--print-config"])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("glued", [True, False])
def test_print_config_of_a_file_with_flags_over_it(capsys, glued):
    path = str(CONFIGS / "captioning/vatex/vit-l16/token_mixing-f.yaml")
    config = [f"--config={path}"] if glued else ["--config", path]
    flags = ["--learning-rate", "2e-5", "--num-frames", "4", "--layers", "-1", "5"]
    found = printed(capsys, "caption", "train", *config, *flags, "--ffn", "False")
    wanted = plain(read_experiment(path))
    wanted["training"]["learning_rate"] = 2e-5
    wanted["videos"]["num_frames"] = 4
    wanted["tuning"].update(layers=[-1, 5], ffn=False)
    assert found == wanted


def test_print_config_without_a_file_and_of_the_small_model(capsys):
    assert printed(capsys, "retrieval", "train") == plain(Retrieval())
    assert printed(capsys, "caption", "train") == plain(Captioning())
    small = printed(capsys, "retrieval", "train", "--tiny", "--epochs", "9")
    assert small["tiny"] is True
    assert small["training"]["epochs"] == 9
    assert small["training"]["batch_size"] == Retrieval().training.batch_size


@pytest.mark.parametrize(
    ("flags", "everything"),
    [
        ((), True),
        (("--method", "spatial"), True),
        (("--method", "token_mixing", "--everything", "False"), False),
        (("--method", "bitfit"), None),
        (("--config", str(CONFIGS / "retrieval/msrvtt/vit-b16/lora.yaml")), None),
    ],
    ids=str,
)
def test_flags_and_files_win_over_the_small_models_settings(capsys, flags, everything):
    found = printed(capsys, "retrieval", "train", "--tiny", *flags)
    assert found["tuning"]["everything"] is everything


@pytest.mark.parametrize("command", ["caption", "retrieval"])
def test_a_bad_file_ends_the_command_with_a_sentence(capsys, tmp_path, command):
    path = tmp_path / "mine.yaml"
    path.write_text("task: cooking")
    for config, text in ((path, "must hold a line task"), (tmp_path / "none.yaml", "none.yaml")):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "train", "--config", str(config)])
        assert str(stop.value.code).startswith("tokenmix: ")
        assert text in str(stop.value.code)
        assert "\n" not in str(stop.value.code)

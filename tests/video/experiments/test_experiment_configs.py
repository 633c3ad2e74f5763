"""Config files: what the shipped ones compose, round trips, and errors in one."""

import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tokenmix_ops.video import cli
from tokenmix_ops.video.engine.hyperparameters import Training
from tokenmix_ops.video.experiments.configs import as_yaml, plain, read_experiment
from tokenmix_ops.video.experiments.settings import (
    Captioning,
    Contrast,
    Decoding,
    Retrieval,
    Videos,
)
from tokenmix_ops.video.tuning.spec import MethodName, Tuning

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml"))

# The authors' recipe, typed here again: epochs and beams of each data set, what differs per task
# and per backbone. All else is what the settings default to.
CAPTIONING = {"msvd": (6, 3), "msrvtt": (5, 5), "vatex": (5, 5)}
RETRIEVAL = ("msrvtt", "lsmdc")
BACKBONES = {"vit-b16": ("base", 16, 0.0), "vit-l16": ("large", 8, 0.1)}
EVERYTHING = {name: (None,) for name in typing.get_args(MethodName)}
EVERYTHING |= {"spatial": (None, True), "token_mixing": (None, True)}

GRID = [
    (task, dataset, backbone, method, everything)
    for task, datasets in (("captioning", CAPTIONING), ("retrieval", RETRIEVAL))
    for dataset in datasets
    for backbone in BACKBONES
    for method, choices in EVERYTHING.items()
    for everything in choices
]


def config_of(task, dataset):
    return CONFIGS / task / f"{dataset}.yaml"


def test_every_data_set_of_the_paper_has_a_file():
    assert set(FILES) == {
        *(Path("captioning", f"{dataset}.yaml") for dataset in CAPTIONING),
        *(Path("retrieval", f"{dataset}.yaml") for dataset in RETRIEVAL),
    }


@pytest.mark.parametrize(("task", "dataset", "backbone", "method", "everything"), GRID)
def test_a_file_composes_the_recipe(task, dataset, backbone, method, everything):
    size, batch, drop_path = BACKBONES[backbone]
    tuning = {"method": method, "everything": everything}
    path = config_of(task, dataset)
    read = plain(read_experiment(path, task, backbone=backbone, tuning=tuning))
    wanted = plain({"captioning": Captioning, "retrieval": Retrieval}[task]())
    wanted["drop_path"] = drop_path
    wanted["tuning"].update(tuning)
    # What updates all of ViT-L does not fit otherwise.
    wanted["training"].update(
        gradient_checkpointing=size == "large" and (method == "full" or everything is True)
    )
    if task == "captioning":
        epochs, beams = CAPTIONING[dataset]
        wanted["model"] = f"Salesforce/blip-image-captioning-{size}"
        wanted["training"].update(epochs=epochs, batch_size=batch)
        wanted["decoding"].update(num_beams=beams)
    else:
        wanted["model"] = f"Salesforce/blip-itm-{size}-coco"
    assert read == wanted


def test_the_defaults_are_the_recipe():
    """Otherwise a changed default would change every experiment unseen."""
    captioning, retrieval = plain(Captioning()), plain(Retrieval())
    for read in (captioning, retrieval):
        assert read["tuning"] == {
            "method": "token_mixing", "everything": None, "layers": None, "mixing": "released",
            "linear_projection": None, "language_head": None, "attention": None, "ffn": None,
            "bottleneck": None, "rank": 8, "num_blocks": None, "temporal_position": False,
        }  # fmt: skip
        assert read["videos"] == {
            "data": None, "root": None, "num_frames": 8, "image_size": 224, "select_on": "val",
            "strict": False, "max_unreadable": 0.1, "fps": None, "cache": None, "cache_gib": 50.0,
        }  # fmt: skip
        assert (read["tiny"], read["tokenizer"], read["drop_path"]) == (False, None, 0.0)
        training = dict(read["training"])
        assert (training.pop("epochs"), training.pop("batch_size")) == (
            (5, 16) if read is captioning else (6, 8)
        )
        assert training == {
            "learning_rate": 1e-5, "weight_decay": 0.05, "schedule": "epoch_cosine",
            "warmup_steps": 0, "accumulation": 1, "precision": "no", "max_grad_norm": None,
            "gradient_checkpointing": False, "seed": 0, "workers": 2, "save_every": 0,
            "evaluate_every": 1, "fsdp": False, "max_steps": None,
        }  # fmt: skip
    assert captioning["decoding"] == {
        "num_beams": 3, "min_length": 5, "max_length": 32, "top_p": None
    }  # fmt: skip
    assert retrieval["contrast"] == {
        "queue_size": 57600, "momentum": 0.995, "alpha": 0.4, "temperature": 0.07
    }  # fmt: skip
    assert (captioning["max_tokens"], retrieval["max_tokens"], retrieval["rerank"]) == (40, 35, 128)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_holds_only_what_differs(file):
    overrides = yaml.safe_load((CONFIGS / file).read_text())
    default = plain({"captioning": Captioning, "retrieval": Retrieval}[overrides.pop("task")]())

    def superfluous(part, default):
        for setting, value in part.items():
            inside = isinstance(value, dict)
            if superfluous(value, default[setting]) if inside else value == default[setting]:
                return setting

    backbones = overrides.pop("backbones")
    assert list(backbones) == list(BACKBONES)
    for part in (overrides, *backbones.values()):
        assert superfluous(part.pop("everything", {}), default) is None
        assert superfluous(part, default) is None


def test_the_first_backbone_is_the_default():
    path = config_of("captioning", "msvd")
    assert read_experiment(path) == read_experiment(path, backbone="vit-b16")


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
    "task: retrieval\nbackbones: {}": "backbones must hold a section for each backbone, got {}",
    "task: retrieval\nbackbones: []": "backbones must hold a section for each backbone, got []",
    "task: retrieval\nbackbones: {small: 3}": "backbones.small must hold settings, got 3",
    "task: retrieval\nbackbones: {small: {everything: 1}}": "small.everything must hold settings",
    "task: retrieval\nbackbones: {small: {rate: 1}}": "rate is not a setting",
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
    with pytest.raises(ValueError, match=r"mine.yaml: expected task captioning, got retrieval"):
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


@pytest.mark.interfaces
@pytest.mark.parametrize("glued", [True, False])
def test_print_config_of_a_file_with_flags_over_it(capsys, glued):
    path = str(config_of("captioning", "vatex"))
    config = [f"--config={path}"] if glued else ["--config", path]
    start = ["--everything", "--backbone", "vit-l16", *config]
    flags = ["--learning-rate", "2e-5", "--num-frames", "4", "--layers", "-1", "5"]
    found = printed(capsys, "caption", "train", *flags, *start, "--ffn", "False")
    wanted = plain(read_experiment(path, backbone="vit-l16", tuning={"everything": True}))
    assert wanted["training"]["gradient_checkpointing"] is True
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
        (("--config", str(config_of("retrieval", "msrvtt")), "--method", "lora"), None),
        (("--everything",), True),
    ],
    ids=str,
)
def test_flags_and_files_win_over_the_small_models_settings(capsys, flags, everything):
    found = printed(capsys, "retrieval", "train", "--tiny", *flags)
    assert found["tuning"]["everything"] is everything


@pytest.mark.interfaces
@pytest.mark.parametrize("flag", [["--everything"], ["--everything", "True"]], ids=" ".join)
def test_everything_alone_means_true(capsys, flag):
    for flags in ([*flag, "--method", "spatial"], ["--method", "spatial", *flag]):
        tuning = printed(capsys, "retrieval", "train", *flags)["tuning"]
        assert (tuning["method"], tuning["everything"]) == ("spatial", True)


def test_what_a_section_sets_a_flag_unsets(capsys):
    config = ["--config", str(config_of("captioning", "msvd")), "--backbone", "vit-l16"]
    for more, wanted in (([], True), (["--no-gradient-checkpointing"], False)):
        found = printed(capsys, "caption", "train", *config, "--method", "full", *more)
        assert found["training"]["gradient_checkpointing"] is wanted


def test_a_backbone_that_is_not_there(capsys, tmp_path):
    path, own = config_of("captioning", "msvd"), tmp_path / "mine.yaml"
    own.write_text("task: captioning")
    for config, text in (
        (["--config", str(path)], f"{path}: expected a backbone out of vit-b16, vit-l16, got tiny"),
        (["--config", str(own)], f"{own}: it has no backbones to choose tiny from"),
        ([], "--backbone tiny names a section of --config FILE: pass both"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["caption", "train", *config, "--backbone", "tiny", "--print-config"])
        assert text in str(stop.value.code)


@pytest.mark.parametrize("flags", [["--config"], ["--method", "magic"], ["--everything", "maybe"]])
def test_a_bad_start_is_told_with_the_flag(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        cli.main(["caption", "train", *flags])
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err


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

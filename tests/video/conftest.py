"""Leaves out what the machine lacks the packages for, and says so."""

import multiprocessing
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

import tokenmix_ops

TRAINING = (
    *("accelerate", "av", "peft", "psutil", "pycocoevalcap"),
    *("rich", "transformers", "tyro", "yaml"),
)
NEEDED = {
    "test_blip.py": ("transformers",),
    "test_caption_scores.py": ("psutil", "pycocoevalcap"),
    "test_cli.py": ("av", "matplotlib", "rich", "tyro"),
    "test_cache.py": ("av", "psutil"),
    "test_captioning.py": ("transformers",),
    "test_checkpoints.py": ("peft", "safetensors", "transformers"),
    "test_checking.py": ("av",),
    "test_clips.py": ("av",),
    "test_cross_attention.py": ("transformers",),
    "test_damage.py": ("av",),
    "test_data_check_cli.py": ("av", "rich", "tyro"),
    "test_dataset.py": ("av",),
    "test_encoder.py": ("transformers",),
    "test_experiment_configs.py": TRAINING,
    "test_experiments.py": TRAINING,
    "test_engine.py": ("accelerate", "psutil", "rich", "tensorboard"),
    "test_hub.py": ("huggingface_hub",),
    "test_image_folder.py": ("av",),
    "test_isolation.py": ("psutil",),
    "test_momentum.py": ("safetensors", "transformers"),
    "test_prepare_cli.py": ("av", "rich", "tyro"),
    "test_parameters.py": ("peft", "transformers"),
    "test_ranking.py": ("transformers",),
    "test_retrieval.py": ("transformers",),
    "test_replaced_modules.py": ("peft", "transformers"),
    "test_retrieval_processes.py": ("accelerate", "transformers"),
    "test_search.py": TRAINING,
    "test_score_cli.py": ("av", "matplotlib", "pycocoevalcap", "rich", "tyro", "yaml"),
    "test_shapes.py": ("av",),
    "test_splits.py": TRAINING,
    "test_text.py": ("transformers",),
    "test_tuning.py": ("peft", "transformers"),
    "test_training_cli.py": TRAINING,
    "test_unreadable.py": TRAINING,
    "test_video_errors.py": ("av",),
    "test_video_file.py": ("av",),
    "test_weights.py": ("transformers",),
}
MISSING = {
    file: absent
    for file, packages in NEEDED.items()
    if (absent := [package for package in packages if find_spec(package) is None])
}


def pytest_ignore_collect(collection_path):
    return True if collection_path.name in MISSING else None


def pytest_report_header():
    return [f"left out: {file}, no {', '.join(n)}" for file, n in MISSING.items()]


@pytest.fixture(scope="session")
def processes():
    """Processes that are forked from one that has imported everything and computed nothing."""
    # Some Pythons do not give the server the path to import from.
    helpers = Path(__file__).parents[1] / "helpers"
    paths = (str(helpers), str(Path(tokenmix_ops.__file__).parent.parent))
    os.environ["PYTHONPATH"] = os.pathsep.join((*paths, os.environ.get("PYTHONPATH", "")))
    context = multiprocessing.get_context("forkserver")
    # There is one server for all tests. What cannot be imported is left out.
    context.set_forkserver_preload(["engine_toy", "experiment_runs", "retrieval_models"])
    return context


@pytest.fixture(scope="session")
def experiment_folder(tmp_path_factory):
    """What `experiment_runs.write_all` writes."""
    from experiment_runs import write_all

    return write_all(tmp_path_factory.mktemp("experiments"))

"""Finding a model's folder, with a hub that a test plays."""

import inspect
from types import SimpleNamespace

import pytest

from tokenmix_ops.video import hub

PATTERNS = ("config.json", "model*.safetensors*", "pytorch_model*.bin*")


@pytest.fixture
def calls(monkeypatch):
    """What the played hub is asked; it holds ``files``, or raises ``error``."""
    played = SimpleNamespace(files=(), error=None, asked=[])

    class Api:
        def model_info(self, name, timeout):
            assert timeout <= 10
            if played.error is not None:
                raise played.error
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in played.files])

    def download(name, allow_patterns, local_files_only):
        played.asked.append((name, allow_patterns, local_files_only))
        return "/cache/snapshot"

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    return played


def test_a_directory_is_itself(tmp_path, calls):
    assert hub.model_folder(tmp_path, PATTERNS, "") == tmp_path
    assert calls.asked == []


@pytest.mark.parametrize("safetensors", [True, False])
def test_weights_are_fetched_in_one_format(safetensors, calls):
    calls.files = ["config.json", "pytorch_model.bin"] + ["model.safetensors"] * safetensors
    assert str(hub.model_folder("a/b", PATTERNS, "")) == "/cache/snapshot"
    wanted = list(PATTERNS[:2] if safetensors else PATTERNS)
    assert calls.asked == [("a/b", wanted, False)]


def test_without_the_hub_the_cache_serves(calls):
    calls.error = ConnectionError("no network")
    assert str(hub.model_folder("a/b", PATTERNS, "")) == "/cache/snapshot"
    assert calls.asked == [("a/b", list(PATTERNS), True)]


def test_what_neither_has_is_named_with_its_cause(calls, monkeypatch):
    def nothing(*_, **__):
        raise FileNotFoundError("not in the cache")

    calls.error = ConnectionError("no network\nat all")
    monkeypatch.setattr(hub, "snapshot_download", nothing)
    with pytest.raises(ValueError) as error:
        hub.model_folder("a/b", PATTERNS, "do this")
    assert str(error.value) == (
        "a/b is not a directory or file, and fetching it from the Hugging Face hub failed "
        "(ConnectionError: no network); do this"
    )


@pytest.mark.interfaces
def test_the_hub_takes_what_it_is_asked():
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

    inspect.signature(HfApi.model_info).bind(None, "a/b", timeout=10)
    inspect.signature(snapshot_download).bind("a/b", allow_patterns=[], local_files_only=True)
    about = ModelInfo(id="a/b", siblings=[{"rfilename": "config.json"}])
    assert [type(s) for s in about.siblings] == [RepoSibling]
    assert about.siblings[0].rfilename == "config.json"
    with pytest.raises(HFValidationError):
        HfApi().model_info("a/b/c/d", timeout=10)

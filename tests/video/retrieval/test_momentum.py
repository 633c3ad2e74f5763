"""What a momentum copy shares and copies, how it moves, and that training resumes bit for bit."""

import pytest
import torch
from retrieval_models import batch, tiny_retriever
from safetensors.torch import load_file, save_file

from tokenmix_ops.video.retrieval import RetrievalTraining
from tokenmix_ops.video.retrieval.momentum import MomentumCopy

pytestmark = pytest.mark.interfaces

TRAINED = {
    "last layer": ("encoder.vision_model.encoder.layers.1.", "vision_proj.", "itm_head."),
    "everything": ("",),
    "nothing": (),
}


def partly_trained(which):
    retriever = tiny_retriever()
    for name, parameter in retriever.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED[which]) if TRAINED[which] else False)
    return retriever


@pytest.mark.parametrize("which", TRAINED)
def test_exactly_what_is_trained_and_embedded_by_is_copied(which):
    retriever = partly_trained(which)
    follower = MomentumCopy(retriever, 0.9)
    followed = dict(follower.model.named_parameters())
    for name, parameter in retriever.named_parameters():
        if name.startswith("itm_head.") or ".crossattention." in name:
            assert name not in followed
            continue
        other, copied = followed.pop(name), parameter.requires_grad
        assert (name in follower.names) == copied, name
        assert (other.data_ptr() != parameter.data_ptr()) == copied, name
        assert torch.equal(other, parameter)
        if copied:
            assert not other.requires_grad
            assert other.data_ptr() not in {p.data_ptr() for p in retriever.parameters()}
    assert not followed
    if which == "last layer":
        assert len(follower.names) == 12 + 2


def test_trained_weights_show_once_and_momentum_weights_not_at_all():
    trained = RetrievalTraining(partly_trained("everything"), queue_size=5)
    shown = {name for name, p in trained.named_parameters() if p.requires_grad}
    own = {f"retriever.{name}" for name, _ in trained.retriever.named_parameters()}
    assert shown == own | {"temperature"}
    trained = RetrievalTraining(partly_trained("last layer"), queue_size=5)
    wanted = {
        f"retriever.{name}" for name, p in trained.retriever.named_parameters() if p.requires_grad
    }
    shown = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert shown == wanted | {"temperature"}


def test_frozen_weights_stay_shared_when_moved():
    trained = RetrievalTraining(partly_trained("last layer"), queue_size=5).double()
    name = "text_encoder.embeddings.word_embeddings.weight"
    follower = trained.momentum_copy.model
    assert follower.get_parameter(name) is trained.retriever.get_parameter(name)
    assert follower.get_parameter(name).dtype == torch.float64


def test_an_update_moves_the_copies_by_one_minus_momentum():
    retriever = partly_trained("last layer")
    follower = MomentumCopy(retriever, 0.9)
    before = {name: p.clone() for name, p in follower.model.named_parameters()}
    with torch.no_grad():
        for parameter in retriever.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    now = {name: p.clone() for name, p in retriever.named_parameters()}
    follower.update(retriever)
    for name, parameter in follower.model.named_parameters():
        expected = 0.9 * before[name] + 0.1 * now[name] if name in follower.names else now[name]
        torch.testing.assert_close(parameter, expected)
    for name, parameter in retriever.named_parameters():
        assert torch.equal(parameter, now[name])


def test_it_has_dropout_while_training_as_in_blip():
    trained = RetrievalTraining(tiny_retriever(dropout=0.5), queue_size=5)
    one, follower = batch([0, 1]), trained.momentum_copy.model
    inputs = one["input_ids"], one["attention_mask"]
    assert not torch.equal(follower.embed_texts(*inputs), follower.embed_texts(*inputs))
    trained.eval()
    assert torch.equal(follower.embed_texts(*inputs), follower.embed_texts(*inputs))


def steps(trained, optimizer, numbers):
    """Losses of some steps, each seeded by its number."""
    losses = []
    for number in numbers:
        torch.manual_seed(number)
        found = trained(batch([number, number + 1, 0], seed=number), 0.3)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        trained.after_update()
        losses.append(found["loss"].item())
    return losses


def build(which, seed=0):
    retriever = tiny_retriever(seed, dropout=0.1)
    for name, parameter in retriever.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED[which]))
    trained = RetrievalTraining(retriever, queue_size=7, temperature=0.1)
    updated = [p for p in trained.parameters() if p.requires_grad]
    return trained, torch.optim.AdamW(updated, 1e-2)


@pytest.mark.parametrize("which", ["last layer", "everything"])
def test_training_resumes_bit_for_bit(tmp_path, which):
    trained, optimizer = build(which)
    steps(trained, optimizer, range(1, 4))
    # Which refuses tensors that share memory: nothing is held twice.
    save_file(trained.state_dict(), tmp_path / "state.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    expected = steps(trained, optimizer, range(4, 7))

    resumed, other_optimizer = build(which, seed=9)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    other_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert steps(resumed, other_optimizer, range(4, 7)) == expected
    for name, tensor in trained.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_state_without_its_momentum_copies_is_refused():
    trained, _ = build("last layer")
    state = trained.state_dict()
    held = [name for name in state if name.startswith("momentum_copy.")]
    assert len(held) == len(trained.momentum_copy.names)
    del state[held[0]]
    with pytest.raises(RuntimeError, match="Missing key"):
        trained.load_state_dict(state)


def test_a_state_can_be_put_back_in_place():
    # As the engine takes up a training: it writes into what the state dict gives out.
    trained, optimizer = build("last layer")
    steps(trained, optimizer, range(1, 3))
    saved = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    one = batch(list(range(8)))
    expected = trained.eval()(one, 0.3)["itm"]
    resumed, _ = build("last layer", seed=9)
    with torch.no_grad():
        for name, tensor in resumed.state_dict().items():
            tensor.copy_(saved[name])
    assert torch.equal(resumed.eval()(one, 0.3)["itm"], expected)
    # The next draw is another one.
    assert not torch.equal(resumed(one, 0.3)["itm"], expected)

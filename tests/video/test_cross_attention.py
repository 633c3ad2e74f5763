"""Cross-attention to videos against transformers' own, and how often keys are computed."""

import pytest
import torch
from caption_models import clip, tiny_blip
from torch import nn
from transformers import BlipTextConfig, EncoderDecoderCache
from transformers.models.blip.modeling_blip_text import BlipTextModel, BlipTextSelfAttention

from tokenmix_ops.testing import max_error
from tokenmix_ops.video.cross_attention import CrossAttention, VideoMemory, share_video_keys

pytestmark = pytest.mark.interfaces

VIDEOS, TOKENS, WIDTH, DIM, LENGTH = 3, 10, 24, 16, 5


def layers(dropout=0.0):
    """transformers' layer, in float64, and ours on the same parameters."""
    config = BlipTextConfig(
        hidden_size=DIM,
        num_attention_heads=4,
        encoder_hidden_size=WIDTH,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(0)
    original = BlipTextSelfAttention(config, is_cross_attention=True).double().eval()
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    return original, CrossAttention(original)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


class Calls:
    """Counts the rows that modules are called with, by name."""

    def __init__(self, model, *names):
        self.rows = {}
        for name, module in model.named_modules():
            if name.endswith(names):
                self.rows[name] = []
                module.register_forward_hook(
                    lambda _, inputs, __, name=name: self.rows[name].append(len(inputs[0]))
                )


@pytest.mark.parametrize("texts_a_video", [1, 2, 4])
@pytest.mark.parametrize("length", [1, LENGTH])
def test_it_is_transformers_layer_with_every_video_repeated_for_its_texts(texts_a_video, length):
    original, ours = layers()
    tokens = random(VIDEOS, TOKENS, WIDTH)
    hidden = random(VIDEOS * texts_a_video, length, DIM, seed=1)
    wanted, _ = original(
        hidden, encoder_hidden_states=tokens.repeat_interleave(texts_a_video, dim=0)
    )
    grads = torch.autograd.grad(wanted.square().sum(), (tokens, hidden, *original.parameters()))
    for videos in (tokens, VideoMemory(tokens)):
        given, weights = ours(hidden, encoder_hidden_states=videos)
        assert weights is None
        assert given.shape == wanted.shape
        assert max_error(given, wanted) < 1e-12
        own = torch.autograd.grad(given.square().sum(), (tokens, hidden, *original.parameters()))
        assert all(max_error(a, b) < 1e-10 for a, b in zip(own, grads, strict=True))


def test_texts_read_their_own_video_only():
    _, ours = layers()
    tokens, hidden = random(VIDEOS, TOKENS, WIDTH).detach(), random(2 * VIDEOS, LENGTH, DIM)
    before, _ = ours(hidden, encoder_hidden_states=VideoMemory(tokens))
    tokens[1] = torch.nan
    after, _ = ours(hidden, encoder_hidden_states=VideoMemory(tokens))
    assert after[2:4].isnan().all()
    assert torch.equal(after[[0, 1, 4, 5]], before[[0, 1, 4, 5]])


def test_a_memory_projects_each_video_once_a_layer():
    _, ours = layers()
    calls = Calls(ours, "key", "value").rows
    memory = VideoMemory(random(VIDEOS, TOKENS, WIDTH))
    for texts_a_video in (1, 5, 2):
        ours(random(VIDEOS * texts_a_video, 1, DIM), encoder_hidden_states=memory)
    assert calls == {"key": [VIDEOS], "value": [VIDEOS]}
    assert [part.shape for part in memory.of(ours)] == [(VIDEOS, 4, TOKENS, DIM // 4)] * 2


def test_layers_do_not_share_keys():
    _, first = layers()
    _, second = layers()
    nn.init.zeros_(second.value.weight)
    memory = VideoMemory(random(VIDEOS, TOKENS, WIDTH))
    assert not torch.equal(memory.of(first)[1], memory.of(second)[1])


@pytest.mark.parametrize("index", [[0], [2, 0], [1, 1, 1, 0], []])
def test_select_picks_what_is_computed_and_computes_the_rest_when_needed(index):
    _, done = layers()
    _, later = layers()
    memory = VideoMemory(random(VIDEOS, TOKENS, WIDTH))
    memory.of(done)
    calls = [Calls(layer, "key", "value").rows for layer in (done, later)]
    chosen = memory.select(torch.tensor(index, dtype=torch.int64))
    assert chosen.num_videos == len(index)
    assert torch.equal(chosen.tokens, memory.tokens[index])
    fresh = VideoMemory(memory.tokens[index])
    for layer, rows in zip((done, later), calls, strict=True):
        key, value = chosen.of(layer)
        computed = [] if layer is done else [len(index)]
        assert rows == {"key": computed, "value": computed}
        assert max_error(key, fresh.of(layer)[0]) < 1e-12
        assert max_error(value, fresh.of(layer)[1]) < 1e-12
    assert memory.num_videos == VIDEOS


def test_gradients_reach_the_tokens_through_a_selection():
    _, ours = layers()
    tokens = random(VIDEOS, TOKENS, WIDTH)
    memory = VideoMemory(tokens)
    memory.of(ours)
    output, _ = ours(random(2, 1, DIM), encoder_hidden_states=memory.select(torch.tensor([2, 0])))
    (grad,) = torch.autograd.grad(output.sum(), tokens)
    assert [bool(rows.any()) for rows in grad] == [True, False, True]


def test_dropout_is_that_of_the_original_and_of_training_only():
    _, ours = layers(dropout=0.5)
    memory, hidden = VideoMemory(random(1, TOKENS, WIDTH)), random(1, LENGTH, DIM)

    def output():
        return ours(hidden, encoder_hidden_states=memory)[0].detach()

    still = output()
    assert torch.equal(still, output())
    ours.train()
    torch.manual_seed(0)
    dropped = torch.stack([output() for _ in range(2000)])
    assert not torch.equal(dropped[0], dropped[1])
    spread = dropped.std(dim=0) / 2000**0.5
    assert ((dropped.mean(dim=0) - still).abs() < 5 * spread).all()


def test_a_text_model_keeps_its_names_and_results():
    model, plain = tiny_blip().text_decoder, tiny_blip().text_decoder
    names = list(model.state_dict())
    share_video_keys(model)
    share_video_keys(model)
    assert list(model.state_dict()) == names
    layers = model.bert.encoder.layer
    assert all(type(layer.crossattention.self) is CrossAttention for layer in layers)
    assert all(type(layer.attention.self) is BlipTextSelfAttention for layer in layers)
    ids = torch.randint(3, 20, (4, LENGTH))
    tokens = clip(2, 1).flatten(1)[:, : TOKENS * WIDTH].unflatten(1, (TOKENS, WIDTH))
    given = model(ids, encoder_hidden_states=VideoMemory(tokens)).logits
    wanted = plain(ids, encoder_hidden_states=tokens.repeat_interleave(2, dim=0)).logits
    assert max_error(given, wanted) < 1e-11


def test_the_cache_of_past_keys_stays_without_the_videos():
    model = tiny_blip().text_decoder
    share_video_keys(model)
    tokens = random(2, TOKENS, WIDTH)
    output = model(torch.full((2, 3), 5), encoder_hidden_states=VideoMemory(tokens), use_cache=True)
    (past,) = (value for value in output.values() if isinstance(value, EncoderDecoderCache))
    assert past.self_attention_cache.get_seq_length() == 3
    assert past.cross_attention_cache.get_seq_length() == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_is_refused_whatever_it_hides_and_places_of_words_are_not(compiled):
    _, ours = layers()
    tokens, hidden = random(VIDEOS, TOKENS, WIDTH), random(VIDEOS, LENGTH, DIM)
    wanted, _ = ours(hidden, encoder_hidden_states=tokens)
    torch.compiler.reset()
    call = torch.compile(ours, backend="eager") if compiled else ours
    seen = torch.ones(VIDEOS, TOKENS, dtype=torch.bool)
    for mask in (seen, torch.zeros(VIDEOS, 1, 1, TOKENS), ~seen, seen.tolist(), seen.numpy()):
        with pytest.raises(ValueError, match="no attention mask and no other keys, got a_mask"):
            call(hidden, encoder_hidden_states=tokens, a_mask=mask)
    for args in ((hidden,), (None, seen)):
        with pytest.raises(ValueError, match="got a second tensor"):
            call(hidden, *args, encoder_hidden_states=tokens)
    with pytest.raises(ValueError, match="got position_ids"):
        call(hidden, encoder_hidden_states=tokens, position_ids=torch.ones(LENGTH))
    call = torch.compile(ours, backend="eager", fullgraph=True) if compiled else ours
    places = dict.fromkeys(("cache_position", "position_ids"), torch.arange(LENGTH))
    given, _ = call(hidden, None, encoder_hidden_states=tokens, attention_mask=None, **places)
    assert max_error(given, wanted) < 1e-12


def test_what_cannot_be_is_refused():
    _, ours = layers()
    tokens, hidden = random(VIDEOS, TOKENS, WIDTH), random(VIDEOS + 1, LENGTH, DIM)
    with pytest.raises(ValueError, match="a multiple of 3 videos, got 4"):
        ours(hidden, encoder_hidden_states=tokens)
    with pytest.raises(ValueError, match="a multiple of 0 videos, got 4"):
        ours(hidden, encoder_hidden_states=tokens[:0])
    with pytest.raises(ValueError, match="needs videos: pass them as encoder_hidden_states"):
        ours(hidden)
    with pytest.raises(
        ValueError, match=r"expected tokens \[videos, num_tokens, dim\], got \[10, 24\]"
    ):
        VideoMemory(tokens[0])
    bare = BlipTextConfig(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, is_decoder=False, vocab_size=9
    )
    with pytest.raises(ValueError, match="BlipTextModel has no cross-attention: set is_decoder"):
        share_video_keys(BlipTextModel(bare))

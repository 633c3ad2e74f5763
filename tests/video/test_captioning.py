"""The captioner against transformers' decoder, which is given plain tensors."""

import copy

import pytest
import torch
from caption_models import (
    DEC,
    FRAMES,
    PAD,
    SEP,
    VOCABULARY,
    captions,
    clip,
    redraw,
    tiny_blip,
    tiny_captioner,
)

from tokenmix_ops.testing import max_error
from tokenmix_ops.video.captioning import VideoCaptioner
from tokenmix_ops.video.cross_attention import CrossAttention, VideoMemory
from tokenmix_ops.video.engine.checkpointing import checkpoint_layers
from tokenmix_ops.video.tuning import Tuning, apply

pytestmark = pytest.mark.interfaces


def pair(**arguments):
    """A captioner, transformers' decoder of the same weights, and the videos' tokens for it."""
    plain = tiny_blip(**arguments)
    captioner = VideoCaptioner(copy.deepcopy(plain), num_frames=FRAMES).eval()
    pixels = clip()
    frames = plain.vision_model(pixels.flatten(0, 1)).last_hidden_state
    return captioner, plain.text_decoder, pixels, frames.unflatten(0, (-1, FRAMES)).flatten(1, 2)


def generate(decoder, tokens, **arguments):
    """As transformers generates from an encoder's tokens."""
    start = torch.full((len(tokens), 1), DEC)
    return decoder.generate(
        start,
        attention_mask=torch.ones_like(start),
        encoder_hidden_states=tokens.detach(),
        encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.int64),
        eos_token_id=SEP,
        pad_token_id=PAD,
        **arguments,
    )


def projections(captioner):
    """The videos that each key and value projection of the cross-attention was given, by name."""
    rows = {}
    for name, module in captioner.text_decoder.named_modules():
        if name.endswith(("crossattention.self.key", "crossattention.self.value")):
            rows[name] = []
            module.register_forward_hook(
                lambda _, inputs, __, name=name: rows[name].append(len(inputs[0]))
            )
    assert len(rows) == 4
    return rows


def test_the_decoder_reads_the_tokens_of_all_frames():
    captioner, _, pixels, tokens = pair()
    memory = captioner.encode(pixels)
    assert memory.tokens.shape == (2, FRAMES * 10, 24)
    assert max_error(memory.tokens, tokens) < 1e-11


@pytest.mark.parametrize("num_captions", [1, 2])
@pytest.mark.parametrize("num_beams", [1, 3, 5])
def test_beam_search_is_transformers(num_beams, num_captions):
    if num_captions > num_beams:
        pytest.skip("more captions than beams")
    captioner, decoder, pixels, tokens = pair(seed=3)
    arguments = dict(num_beams=num_beams, min_length=5, max_length=12)
    wanted = generate(
        decoder,
        tokens,
        num_return_sequences=num_captions,
        return_dict_in_generate=True,
        output_scores=True,
        **arguments,
    )
    given = captioner.generate(pixels, num_captions=num_captions, **arguments)
    assert given.shape[0] == 2 * num_captions
    assert torch.equal(given, wanted.sequences)
    scored = captioner.generate(
        pixels,
        num_captions=num_captions,
        return_dict_in_generate=True,
        output_scores=True,
        **arguments,
    )
    for step, other in zip(scored.scores, wanted.scores, strict=True):
        assert max_error(step.nan_to_num(), other.nan_to_num()) < 1e-9


def test_videos_get_captions_of_their_own():
    captioner, *_ = pair(seed=3)
    found = captioner.generate(clip(6), num_beams=3, max_length=20)
    assert len({tuple(row.tolist()) for row in found}) > 1
    alone = captioner.generate(clip(6)[4:5], num_beams=3, max_length=20)
    assert torch.equal(alone[0], found[4, : alone.shape[1]])


def test_captions_end_where_they_end_and_are_padded():
    captioner, *_ = pair()
    torch.manual_seed(0)
    found = captioner.generate(clip(6), top_p=0.99, num_captions=5, min_length=5, max_length=20)
    lengths = set()
    for words in found[:, 1:].tolist():
        length = words.index(SEP) + 1 if SEP in words else len(words)
        assert set(words[length:]) <= {PAD}
        lengths.add(length)
    assert (found[:, 0] == DEC).all()
    assert len(lengths) > 2
    # [DEC] and four words, then [SEP].
    assert min(lengths) == 5


@pytest.mark.parametrize("num_captions", [1, 4])
def test_nucleus_sampling_is_transformers(num_captions):
    captioner, decoder, pixels, tokens = pair()
    arguments = dict(top_p=0.8, min_length=4, max_length=12)
    torch.manual_seed(5)
    wanted = generate(
        decoder, tokens, do_sample=True, top_k=0, num_return_sequences=num_captions, **arguments
    )
    torch.manual_seed(5)
    given = captioner.generate(pixels, num_captions=num_captions, **arguments)
    assert torch.equal(given, wanted)
    torch.manual_seed(6)
    assert not torch.equal(
        captioner.generate(pixels, num_captions=num_captions, **arguments), given
    )


def test_the_nucleus_holds_no_more_than_its_probability():
    captioner, *_ = pair()
    pixels = clip(1)
    greedy = captioner.generate(pixels, num_beams=1, min_length=0, max_length=12)
    for _ in range(5):
        narrow = captioner.generate(pixels, top_p=1e-9, min_length=0, max_length=12)
        assert torch.equal(narrow, greedy)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(num_beams=1),
        dict(num_beams=5),
        dict(num_beams=4, num_captions=3),
        dict(top_p=0.9, num_captions=6),
    ],
    ids=str,
)
def test_keys_are_computed_once_a_layer_and_video_whatever_the_beams_and_steps(arguments):
    captioner, *_ = pair()
    rows = projections(captioner)
    memory = captioner.encode(clip(3))
    captioner.generate(memory, min_length=10, max_length=14, **arguments)
    assert all(calls == [3] for calls in rows.values())
    captioner.generate(memory, max_length=9)
    captioner.generate(memory.select(torch.tensor([2, 0])), max_length=9)
    assert all(calls == [3] for calls in rows.values())
    captioner.generate(clip(2), max_length=9)
    assert all(calls == [3, 2] for calls in rows.values())


def test_a_selection_of_videos_gets_their_captions():
    captioner, *_ = pair(seed=3)
    memory = captioner.encode(clip(4))
    everyone = captioner.generate(memory, max_length=12)
    index = torch.tensor([3, 1, 3])
    chosen = captioner.generate(memory.select(index), max_length=12)
    assert torch.equal(chosen, everyone[index, : chosen.shape[1]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_transformers(smoothing):
    captioner, decoder, pixels, tokens = pair()
    captioner.text_decoder.label_smoothing = decoder.label_smoothing = smoothing
    ids, mask = captions()
    assert (mask == 0).any()
    wanted = decoder(
        ids,
        attention_mask=mask,
        encoder_hidden_states=tokens,
        encoder_attention_mask=torch.ones(tokens.shape[:2]),
        labels=ids.masked_fill(mask == 0, -100),
    ).loss
    given = captioner(pixels, ids, mask)
    # The logits go through float32 for the loss, as mixed precision wants it.
    assert max_error(given, wanted) < 1e-6
    wanted.backward()
    given.backward()
    own = dict(captioner.text_decoder.named_parameters())
    for name, parameter in decoder.named_parameters():
        assert max_error(own[name].grad, parameter.grad) < 1e-5 * (1 + parameter.grad.abs().max())


def test_label_smoothing_is_that_of_the_configuration():
    captioner, *_ = pair()
    assert captioner.text_decoder.label_smoothing == 0.1
    ids, mask = captions()
    smooth = captioner(clip(), ids, mask)
    captioner.text_decoder.label_smoothing = 0.0
    assert abs(smooth - captioner(clip(), ids, mask)) > 1e-3


def test_padding_counts_for_nothing():
    captioner, *_ = pair()
    ids, mask = captions(3)
    loss = captioner(clip(3), ids, mask)
    poisoned = torch.where(mask == 0, VOCABULARY - 1, ids)
    assert torch.equal(captioner(clip(3), poisoned, mask), loss)
    longer = torch.nn.functional.pad(ids, (0, 4)), torch.nn.functional.pad(mask, (0, 4))
    assert max_error(captioner(clip(3), *longer), loss) < 1e-6
    # A mean over tokens, not over captions.
    counts = mask.sum(dim=1) - 1
    each = [captioner(clip(3)[i : i + 1], ids[i : i + 1], mask[i : i + 1]) for i in range(3)]
    mean = sum(n * one for n, one in zip(counts, each, strict=True)) / counts.sum()
    assert max_error(mean, loss) < 1e-6


def test_the_first_word_depends_on_the_video_and_not_on_the_words_to_come():
    captioner, *_ = pair()
    ids, mask = captions()
    memory = captioner.encode(clip())

    def logits(ids, memory):
        return captioner.text_decoder(ids, attention_mask=mask, encoder_hidden_states=memory).logits

    changed = ids.clone()
    changed[:, -1] = 7
    before = logits(ids, memory)
    assert max_error(logits(changed, memory)[:, :-1], before[:, :-1]) < 1e-12
    other = logits(ids, captioner.encode(clip(seed=9)))
    assert (other - before).abs().amax(dim=(1, 2)).min() > 1e-3


@pytest.mark.parametrize("method", ["full", "token_mixing", "bitfit"])
def test_gradient_checkpointing_changes_nothing(method):
    gradients = []
    for checkpointed in (False, True):
        captioner = tiny_captioner().train()
        apply(captioner, Tuning(method=method))
        if checkpointed:
            checkpoint_layers(captioner)
        captioner(clip(), *captions()).backward()
        gradients.append({n: p.grad for n, p in captioner.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert max_error(checkpointed[name], gradient) < 1e-12, name


def test_it_has_the_models_parameters_under_the_models_names():
    plain = tiny_blip()
    captioner = tiny_captioner()
    names = {name.removeprefix("encoder.") for name in captioner.state_dict()}
    assert names == set(plain.state_dict())
    assert captioner.tuning is None
    assert captioner.blip_config.text_config.vocab_size == VOCABULARY
    assert isinstance(plain, captioner.blip_class)
    crossed = [m for m in captioner.modules() if isinstance(m, CrossAttention)]
    assert len(crossed) == 2


def test_the_language_head_is_its_transform_and_the_biases_of_words():
    captioner = tiny_captioner()
    heads = {id(parameter) for parameter in captioner.heads()}
    assert {n for n, p in captioner.named_parameters() if id(p) in heads} == {
        "text_decoder.cls.predictions.bias",
        "text_decoder.cls.predictions.transform.dense.weight",
        "text_decoder.cls.predictions.transform.dense.bias",
        "text_decoder.cls.predictions.transform.LayerNorm.weight",
        "text_decoder.cls.predictions.transform.LayerNorm.bias",
    }


def test_decoding_leaves_no_graph_and_the_mode_as_it_was():
    captioner = tiny_captioner().train()
    memory = captioner.encode(clip())
    captioner.generate(clip(), max_length=6)
    assert captioner.training
    assert memory.tokens.requires_grad
    assert not captioner.generate(memory, max_length=6).requires_grad


def test_it_trains_on_a_device_in_low_precision():
    captioner = redraw(tiny_captioner(dtype=torch.float32), scale=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = captioner(clip(dtype=torch.float32), *captions())
        found = captioner.generate(clip(dtype=torch.float32), max_length=6)
    assert loss.dtype == torch.float32
    assert found.dtype == torch.int64
    loss.backward()
    assert all(p.grad.isfinite().all() for p in captioner.parameters())


def test_what_does_not_fit_is_named():
    captioner = tiny_captioner()
    ids, mask = captions(3)
    for given in ((clip(), ids, mask), (clip(3), ids, mask[:, 1:]), (clip(3), ids[:, 1:], mask)):
        with pytest.raises(ValueError, match=r"expected input_ids and attention_mask \[batch, le"):
            captioner(*given)
    with pytest.raises(ValueError, match="expected pixels"):
        captioner(clip(num_frames=FRAMES + 1), *captions())
    with pytest.raises(ValueError, match="num_return_sequences"):
        captioner.generate(clip(), num_beams=2, num_captions=3)
    model = tiny_blip()
    for layer in model.text_decoder.bert.encoder.layer:
        del layer.crossattention
    with pytest.raises(ValueError, match="has no cross-attention"):
        VideoCaptioner(model)
    assert isinstance(captioner.encode(clip()), VideoMemory)

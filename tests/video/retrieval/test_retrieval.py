"""The retriever and its losses against plain loops over a model of transformers."""

import math
import re
from functools import partial

import pytest
import torch
from retrieval_models import FRAMES, VOCABULARY, batch, texts, tiny_model, tiny_retriever
from torch import nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from tokenmix_ops.video.retrieval import RetrievalTraining, VideoRetriever, contrastive, training
from tokenmix_ops.video.retrieval.contrastive import FeatureQueue, Features
from tokenmix_ops.video.retrieval.matching import Negatives, draw_negatives, matching_loss

CLOSE = dict(rtol=1e-10, atol=1e-10)


def double_retriever():
    return tiny_retriever().double().eval()


@pytest.mark.interfaces
def test_names_are_those_of_transformers_but_for_the_tower():
    names = tiny_model().state_dict().keys()
    expected = {name.replace("vision_model.", "encoder.vision_model.", 1) for name in names}
    assert tiny_retriever().state_dict().keys() == expected


@pytest.mark.interfaces
def test_modules_are_the_models_own():
    model = tiny_model()
    retriever = VideoRetriever(model, num_frames=FRAMES)
    assert {id(p) for p in retriever.parameters()} == {id(p) for p in model.parameters()}


def test_what_is_no_retrieval_model_is_refused():
    with pytest.raises(ValueError, match="model must be a BlipForImageTextRetrieval, got Linear"):
        VideoRetriever(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="enc_token_id must be one of the 24 tokens, got 24"):
        VideoRetriever(tiny_model(), enc_token_id=24)


def test_an_embedding_needs_the_cls_rows_only():
    retriever, pixels = double_retriever(), batch([0, 1], dtype=torch.float64)["pixels"]
    embedding, tokens = retriever.encode_videos(pixels)
    torch.testing.assert_close(retriever.embed_videos(pixels), embedding, **CLOSE)
    frames = tokens.unflatten(1, (FRAMES, -1))[:, :, 0]
    mean = torch.stack([retriever.vision_proj(frames[:, t]) for t in range(FRAMES)]).mean(0)
    torch.testing.assert_close(embedding, mean / mean.norm(dim=1, keepdim=True), **CLOSE)


@pytest.mark.interfaces
def test_text_embeddings_are_those_of_transformers():
    model = tiny_model().double().eval()
    ids, mask = texts(4)
    plain = model.text_encoder(ids, attention_mask=mask).last_hidden_state[:, 0]
    found = double_retriever().embed_texts(ids, mask)
    torch.testing.assert_close(found, normalize(model.text_proj(plain), dim=-1), **CLOSE)


def plain_match(model, ids, mask, tokens):
    """One pair at a time, by transformers' own cross-attention."""
    ids = ids.clone()
    ids[0] = VOCABULARY - 1
    hidden = model.text_encoder(
        ids[None], attention_mask=mask[None], encoder_hidden_states=tokens[None]
    ).last_hidden_state
    return model.itm_head(hidden[0, 0])


@pytest.mark.interfaces
def test_matching_is_that_of_transformers():
    model, retriever = tiny_model().double().eval(), double_retriever()
    tokens = retriever.encode_videos(batch([0, 1], dtype=torch.float64)["pixels"]).tokens
    ids, mask = texts(6)
    found = retriever.match(ids, mask, retriever.remember(tokens))
    for row in range(6):
        expected = plain_match(model, ids[row], mask[row], tokens[row // 3])
        torch.testing.assert_close(found[row], expected, **CLOSE)


def plain_contrastive(own, soft_own, columns, temperature, alpha):
    """Loops over rows and columns; each argument's entries are (video, text, id)."""
    total = 0.0
    for (video, text, row_id), (soft_video, soft_text, _) in zip(own, soft_own, strict=True):
        for query, soft, side in ((video, soft_video, 1), (text, soft_text, 0)):
            logits = [float(query @ c[side]) / temperature for c in columns]
            soft_logits = [float(soft @ c[side]) / temperature for c in columns]
            total_soft = sum(math.exp(x) for x in soft_logits)
            log_total = math.log(sum(math.exp(x) for x in logits))
            same = [c[2] == row_id for c in columns]
            for logit, soft_logit, is_same in zip(logits, soft_logits, same, strict=True):
                target = alpha * math.exp(soft_logit) / total_soft
                target += (1 - alpha) * is_same / sum(same)
                total -= target * (logit - log_total)
    return total / (2 * len(own))


@torch.no_grad()
@pytest.mark.parametrize(("epoch", "alpha"), [(0.0, 0.0), (0.25, 0.1), (1.0, 0.4), (3.0, 0.4)])
def test_losses_are_the_plain_ones(monkeypatch, epoch, alpha):
    model, retriever = tiny_model().double().eval(), double_retriever()
    trained = RetrievalTraining(retriever, queue_size=7, temperature=0.2).double().eval()
    # So that the momentum copy differs from what it follows.
    for name in trained.momentum_copy.names:
        trained.momentum_copy.model.get_parameter(name).mul_(0.9)
    drawn = []

    def draw(*arguments):
        drawn.append(draw_negatives(*arguments))
        return drawn[-1]

    monkeypatch.setattr(training, "draw_negatives", draw)
    queue = []
    for step, videos in enumerate(([0, 1, 2], [3, 1, 3], [4, 5, 0])):
        one = batch(videos, seed=step, dtype=torch.float64)
        found = trained(one, epoch)

        embedding, tokens = retriever.encode_videos(one["pixels"])
        text = retriever.embed_texts(one["input_ids"], one["attention_mask"])
        follower = trained.momentum_copy.model
        soft_video = follower.embed_videos(one["pixels"])
        soft_text = follower.embed_texts(one["input_ids"], one["attention_mask"])
        own = list(zip(embedding, text, videos, strict=True))
        soft_own = list(zip(soft_video, soft_text, videos, strict=True))
        expected = plain_contrastive(own, soft_own, soft_own + queue, 0.2, alpha)
        assert found["itc"].item() == pytest.approx(expected, rel=1e-9)
        queue = (queue + soft_own)[-7:]

        losses = []
        for row in range(3):
            wrong_text, wrong_video = drawn[-1].texts[row], drawn[-1].videos[row]
            for text_row, video_row in ((row, row), (wrong_text, row), (row, wrong_video)):
                logits = plain_match(
                    model,
                    one["input_ids"][text_row],
                    one["attention_mask"][text_row],
                    tokens[video_row],
                )
                losses.append(-logits.log_softmax(0)[int(text_row == video_row == row)].item())
        assert found["itm"].item() == pytest.approx(sum(losses) / 9, rel=1e-9)
        assert found["loss"].item() == pytest.approx((found["itc"] + found["itm"]).item())


@pytest.mark.interfaces
def test_every_trained_weight_gets_a_gradient_and_no_momentum_weight():
    trained = RetrievalTraining(tiny_retriever(), queue_size=5)
    found = trained(batch([0, 1, 2]), 0.5)
    assert [name for name, loss in found.items() if loss.requires_grad] == ["loss"]
    found["loss"].backward()
    for name, parameter in trained.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("momentum_copy.")), name


def test_the_temperature_is_clamped_before_it_is_used():
    trained = RetrievalTraining(tiny_retriever().eval(), queue_size=5)
    losses = {}
    for given, used in ((3.0, 0.5), (0.5, 0.5), (-1.0, 0.001), (0.001, 0.001)):
        other = RetrievalTraining(trained.retriever, queue_size=5)
        with torch.no_grad():
            other.temperature.fill_(given)
        found = other(batch([0, 1, 2]), 0)
        assert found["temperature"].item() == pytest.approx(used)
        losses.setdefault(used, []).append(found["loss"].item())
    assert all(first == second for first, second in losses.values())


def features(count, ids, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    video, text = normalize(torch.randn(2, count, dim, generator=generator), dim=-1)
    return Features(video, text, torch.tensor(ids))


def test_the_queue_holds_the_latest_whatever_comes_at_a_time():
    queue, latest = FeatureQueue(7, 8), []
    for seed, count in enumerate((3, 3, 2, 7, 1, 20, 4)):
        new = features(count, [100 * seed + i for i in range(count)], seed=seed)
        queue.enqueue(new)
        latest = (latest + list(zip(new.ids.tolist(), new.video, new.text, strict=True)))[-7:]
        filled = queue.ids != contrastive.EMPTY
        assert filled.sum() == len(latest)
        held = {int(i): place for place, i in enumerate(queue.ids) if i >= 0}
        assert held.keys() == {i for i, _, _ in latest}
        for video_id, video, text in latest:
            assert torch.equal(queue.video[held[video_id]], video)
            assert torch.equal(queue.text[held[video_id]], text)


def test_empty_entries_of_the_queue_take_no_part():
    trained = RetrievalTraining(tiny_retriever().eval(), queue_size=9)
    trained(batch([0, 1]), 0.5)
    poisoned = trained.queue.ids == contrastive.EMPTY
    assert poisoned.sum() == 7
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    clean = trained(batch([2, 3], seed=1), 0.5)["itc"]
    trained.load_state_dict(state)
    trained.queue.video[poisoned] = 1e4
    trained.queue.text[poisoned] = 1e4
    found = trained(batch([2, 3], seed=1), 0.5)
    assert torch.equal(found["itc"], clean)
    grads = torch.autograd.grad(found["loss"], trained.retriever.vision_proj.weight)
    assert grads[0].isfinite().all()


def test_negatives_are_drawn_by_the_softmax_of_similarity_without_the_same_video():
    ids = [0, 1, 0, 2, 3]
    pairs, temperature = features(5, ids), torch.tensor([0.5])
    counts, draws = torch.zeros(2, 5, 5), 4000
    for seed in range(draws):
        drawn = draw_negatives(pairs, temperature, torch.Generator().manual_seed(seed))
        counts[0, torch.arange(5), drawn.texts] += 1
        counts[1, torch.arange(5), drawn.videos] += 1
    for direction, (queries, keys) in enumerate(
        ((pairs.video, pairs.text), (pairs.text, pairs.video))
    ):
        for row in range(5):
            weights = [
                0.0 if ids[c] == ids[row] else math.exp(float(queries[row] @ keys[c]) / 0.5)
                for c in range(5)
            ]
            for column in range(5):
                share = weights[column] / sum(weights)
                # Five standard deviations.
                room = 5 * math.sqrt(share * (1 - share) / draws)
                assert abs(counts[direction, row, column] / draws - share) <= room


def test_negatives_exist_at_the_lowest_temperature():
    # Where the softmax itself is 0 everywhere but at the pair.
    opposite = torch.tensor([[1.0, 0], [-1, 0]])
    pairs = Features(opposite, opposite, torch.tensor([0, 1]))
    drawn = draw_negatives(pairs, torch.tensor([0.001]), torch.Generator().manual_seed(0))
    assert drawn.texts.tolist() == drawn.videos.tolist() == [1, 0]


def test_pairs_of_one_video_have_no_negatives_and_match_without():
    drawn = draw_negatives(features(3, [4, 4, 4]), torch.tensor([0.1]), torch.Generator())
    assert isinstance(drawn, Negatives)
    assert not drawn.exist
    positives, negatives = torch.randn(3, 2), torch.full((6, 2), torch.nan)
    expected = -positives.log_softmax(1)[:, 1].mean()
    found = matching_loss(positives, negatives.nan_to_num(), drawn.exist)
    torch.testing.assert_close(found, expected)
    trained = RetrievalTraining(tiny_retriever(), queue_size=5)
    assert trained(batch([4]), 0.0)["loss"].isfinite()


def test_negatives_differ_from_step_to_step_and_by_seed():
    def of(seed, steps=3):
        drawn = []
        trained = RetrievalTraining(tiny_retriever().eval(), queue_size=5, seed=seed)
        for _ in range(steps):
            drawn.append(trained(batch(list(range(8))), 0)["itm"].item())
        return drawn

    first = of(0)
    assert len(set(first)) == 3
    assert first == of(0)
    assert first[0] != of(1, 1)[0]


def test_checkpointed_text_layers_give_the_same_gradients():
    grads = []
    for checkpointed in (False, True):
        retriever = tiny_retriever().double()
        for layer in retriever.text_encoder.encoder.layer if checkpointed else ():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        trained = RetrievalTraining(retriever, queue_size=5).double()
        trained(batch([0, 1, 2], dtype=torch.float64), 0.5)["loss"].backward()
        grads.append({name: p.grad for name, p in retriever.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, **CLOSE, msg=name)


def test_similarities_are_float32_under_autocast():
    trained = RetrievalTraining(tiny_retriever().eval(), queue_size=5)
    expected = trained(batch([0, 1, 2]), 0.5)["itc"]
    again = RetrievalTraining(trained.retriever, queue_size=5)
    with torch.autocast("cpu", torch.bfloat16):
        found = again(batch([0, 1, 2]), 0.5)
    assert found["itc"].dtype == torch.float32
    assert abs(found["itc"] - expected) < 0.1 * expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(queue_size=0), "queue_size must be at least 1, got 0"),
        (dict(momentum=1.5), "momentum must be between 0 and 1, got 1.5"),
        (dict(alpha=-0.1), "alpha must be between 0 and 1, got -0.1"),
        (dict(temperature=0.7), "temperature must be between 0.001 and 0.5, got 0.7"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RetrievalTraining(tiny_retriever(), **settings)

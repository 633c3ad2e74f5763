"""Ranking against scores worked out pair by pair."""

import pytest
import torch
from retrieval_models import VOCABULARY, batch, texts, tiny_model, tiny_retriever

from tokenmix_ops.video.cross_attention import CrossAttention
from tokenmix_ops.video.retrieval import rank, ranking

VIDEOS, TEXTS = 5, 9
CLOSE = dict(rtol=1e-5, atol=1e-5)


def clips(sizes=(2, 3), repeated=()):
    pixels = batch(list(range(VIDEOS)))["pixels"]
    numbers = torch.tensor([3, 0, 4, 1, 2])
    found = [
        {"pixels": p, "videos": n}
        for p, n in zip(pixels.split(sizes), numbers.split(sizes), strict=True)
    ]
    return found + [found[i] for i in repeated]


def pair_by_pair():
    """Similarity and "yes" of all pairs, by transformers' own text encoder."""
    retriever, model = tiny_retriever().eval(), tiny_model().eval()
    ids, mask = texts(TEXTS)
    similarity, yes = torch.empty(TEXTS, VIDEOS), torch.empty(TEXTS, VIDEOS)
    with torch.no_grad():
        for one in clips():
            for pixels, video in zip(one["pixels"], one["videos"].tolist(), strict=True):
                embedding, tokens = retriever.encode_videos(pixels[None])
                for text in range(TEXTS):
                    inputs = ids[text : text + 1].clone(), mask[text : text + 1]
                    similarity[text, video] = retriever.embed_texts(*inputs)[0] @ embedding[0]
                    inputs[0][:, 0] = VOCABULARY - 1
                    hidden = model.text_encoder(
                        inputs[0], attention_mask=inputs[1], encoder_hidden_states=tokens
                    ).last_hidden_state
                    yes[text, video] = model.itm_head(hidden[:, 0])[0, 1]
    return similarity, yes


def best(scores, count):
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


@pytest.mark.interfaces
@pytest.mark.parametrize("rerank", [1, 2, 128])
@pytest.mark.parametrize("at_once", [2, 128])
def test_reranking_is_that_of_pairs_one_by_one(monkeypatch, rerank, at_once):
    monkeypatch.setattr(ranking, "TEXTS_AT_ONCE", at_once)
    similarity, yes = pair_by_pair()
    found = rank(tiny_retriever(), clips(), *texts(TEXTS), num_videos=VIDEOS, rerank=rerank)
    by_text = found.text_to_video, similarity, yes
    by_video = found.video_to_text.T, similarity.T, yes.T
    for scores, similar, matched in (by_text, by_video):
        for query in range(len(scores)):
            chosen = best(similar[query].tolist(), rerank)
            expected = matched[query] + similar[query]
            torch.testing.assert_close(scores[query, chosen], expected[chosen], **CLOSE)
            others = [i for i in range(scores.shape[1]) if i not in chosen]
            if others:
                assert scores[query, others].max() < scores[query, chosen].min()
                in_order = best(similar[query].tolist(), None)
                assert best(scores[query].tolist(), None)[len(chosen) :] == in_order[len(chosen) :]


def test_keys_and_values_are_computed_once_a_video_and_layer(monkeypatch):
    retriever = tiny_retriever()
    layers = [m for m in retriever.modules() if isinstance(m, CrossAttention)]
    calls = {layer: 0 for layer in layers}
    for layer in layers:

        def count(module, inputs, output, layer=layer):
            calls[layer] += 1

        layer.key.register_forward_hook(count)
    monkeypatch.setattr(ranking, "TEXTS_AT_ONCE", 2)
    rank(retriever, clips(), *texts(TEXTS), num_videos=VIDEOS, rerank=4)
    assert list(calls.values()) == [VIDEOS, VIDEOS]


def test_without_reranking_similarity_alone_counts():
    retriever = tiny_retriever()
    retriever.encode_videos = None  # whose tokens nobody needs
    found = rank(retriever, clips(), *texts(TEXTS), num_videos=VIDEOS, rerank=0)
    torch.testing.assert_close(found.text_to_video, pair_by_pair()[0], **CLOSE)
    assert torch.equal(found.text_to_video, found.video_to_text)


def test_the_retriever_is_left_as_it_was_and_dropout_is_off():
    retriever = tiny_retriever(dropout=0.5).train()
    first, second = (
        rank(retriever, clips(), *texts(TEXTS), num_videos=VIDEOS, rerank=2) for _ in range(2)
    )
    assert retriever.training
    assert torch.equal(first.text_to_video, second.text_to_video)


def test_a_video_that_comes_twice_does_no_harm():
    once = rank(tiny_retriever(), clips(), *texts(TEXTS), num_videos=VIDEOS, rerank=2)
    twice = rank(tiny_retriever(), clips((2, 3), (0,)), *texts(TEXTS), num_videos=VIDEOS, rerank=2)
    assert torch.equal(once.text_to_video, twice.text_to_video)


@pytest.mark.parametrize("rerank", [0, 1])
def test_what_it_goes_through_can_be_tracked(rerank):
    seen = {}

    def track(items, description):
        seen[description] = 0
        for item in items:
            yield item
            seen[description] += 1

    rank(tiny_retriever(), clips(), *texts(TEXTS), num_videos=VIDEOS, rerank=rerank, track=track)
    assert seen == ({"videos": 2, "re-ranking": VIDEOS} if rerank else {"videos": 2})


def test_similarity_is_float32_under_autocast():
    seen = []
    retriever = tiny_retriever().eval()

    def heard(name):
        own = getattr(retriever, name)

        def embed(*given):
            seen.append(own(*given))
            return seen[-1]

        setattr(retriever, name, embed)

    heard("embed_videos")
    heard("embed_texts")
    ids, mask = texts(TEXTS)
    # Of one length, so that texts come in their order.
    mask = torch.ones_like(mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = rank(retriever, clips(), ids, mask, num_videos=VIDEOS, rerank=0)
    embedded = next(part for part in seen if len(part) == TEXTS)
    videos = torch.cat([part for part in seen if len(part) != TEXTS])
    order = torch.cat([one["videos"] for one in clips()])
    assert found.text_to_video.dtype == torch.float32
    torch.testing.assert_close(
        found.text_to_video[:, order], embedded @ videos.T, rtol=1e-6, atol=1e-6
    )


def test_tokens_wait_in_the_type_that_autocast_reads():
    with torch.autocast("cpu", torch.bfloat16):
        found = rank(tiny_retriever(), clips(), *texts(TEXTS), num_videos=VIDEOS, rerank=128)
        retriever = tiny_retriever().eval()
        with torch.no_grad():
            one = clips()[0]
            tokens = retriever.encode_videos(one["pixels"]).tokens
            for row, video in enumerate(one["videos"].tolist()):
                memory = retriever.remember(tokens[row : row + 1])
                yes = retriever.match(*texts(TEXTS), memory)[:, 1].float()
                similar = rank(
                    retriever, clips(), *texts(TEXTS), num_videos=VIDEOS, rerank=0
                ).text_to_video[:, video]
                # Trimmed texts round differently in 16 bits; lost tokens would show far more.
                torch.testing.assert_close(
                    found.text_to_video[:, video], yes + similar, rtol=0.05, atol=0.05
                )


def test_what_does_not_fit_is_named():
    def call(num_videos=VIDEOS, rerank=1, mask=None):
        ids, own_mask = texts(TEXTS)
        mask = own_mask if mask is None else mask
        return rank(tiny_retriever(), clips(), ids, mask, num_videos=num_videos, rerank=rerank)

    with pytest.raises(ValueError, match="rerank must not be negative, got -1"):
        call(rerank=-1)
    with pytest.raises(ValueError, match="cover videos 0 to 6, but 5 is missing"):
        call(num_videos=7)
    with pytest.raises(ValueError, match="cover videos 0 to 2, but 3 is out of range"):
        call(num_videos=3)
    with pytest.raises(ValueError, match=r"must be \[num_texts, length\], got \[9, 7\] and \[7\]"):
        call(mask=torch.ones(7))

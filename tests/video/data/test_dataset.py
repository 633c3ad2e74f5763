"""Batches depend on seed and epoch only: not on workers, on processes, or on an interruption."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Subset

from tokenmix_ops.video.data.cache import FrameCache
from tokenmix_ops.video.data.clips import ClipError, normalize_clip, read_clip
from tokenmix_ops.video.data.dataset import CaptionedClips, Clips, collate
from tokenmix_ops.video.data.manifest import read_manifest
from tokenmix_ops.video.data.sampling import EpochBatches, generator_for
from tokenmix_ops.video.data.shapes import write_world


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    path = write_world(tmp_path_factory.mktemp("world"), 10, num_frames=12, size=32)
    return read_manifest(path.with_name("videos.jsonl"))


def captioned(manifest, **options):
    return CaptionedClips(manifest, "train", **{"num_frames": 3, "size": 24, **options})


def test_every_caption_is_an_item_with_frames_of_its_video(manifest):
    items = captioned(manifest)
    wanted = [
        (row, caption)
        for row, video in enumerate(manifest.of_split("train"))
        for caption in video.captions
    ]
    assert len(items) == 16
    assert [(items[i]["video"], items[i]["caption"]) for i in range(16)] == wanted
    for i in range(16):
        frames = read_clip(manifest.path_of(items.videos[wanted[i][0]]), 12, 24)
        places = (items[i]["pixels"][:, None] == normalize_clip(frames)).flatten(2).all(2)
        found = places.nonzero()
        assert found[:, 0].tolist() == [0, 1, 2]
        assert found[:, 1].diff().gt(0).all()
        assert items[i]["pixels"].dtype == torch.float32


def test_frames_depend_on_seed_epoch_and_index(manifest):
    items = captioned(manifest)
    again = captioned(manifest)
    torch.manual_seed(7)
    assert again[(4, 2)]["pixels"].equal(items[(4, 2)]["pixels"])
    assert items[2]["pixels"].equal(items[(0, 2)]["pixels"])
    draws = [items[(epoch, 2)]["pixels"] for epoch in range(6)]
    draws += [captioned(manifest, seed=seed)[2]["pixels"] for seed in range(1, 6)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) > 8
    # Captions 2 and 3 belong to one video.
    assert any(not items[(e, 2)]["pixels"].equal(items[(e, 3)]["pixels"]) for e in range(3))


def test_workers_that_live_on_give_the_same_batches(manifest):
    def batches(num_workers):
        items = captioned(manifest)
        sampler = EpochBatches(len(items), 5, seed=3)
        loader = DataLoader(
            items,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            yield from loader

    alone, workers = list(batches(0)), list(batches(2))
    assert len(alone) == len(workers) == 6
    for one, other in zip(alone, workers, strict=True):
        assert one["captions"] == other["captions"]
        assert one["videos"].equal(other["videos"])
        assert one["pixels"].equal(other["pixels"])
        assert one["pixels"].shape == (5, 3, 3, 24, 24)
        assert one["videos"].dtype == torch.int64
    assert not any(
        one["captions"] == other["captions"]
        for one, other in zip(alone[:3], alone[3:], strict=True)
    )


def loaded(items, batches=None, **options):
    """What a loader gives, as hashable items."""
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(items, None, sampler=batches, generator=generator, **options)
    return [
        (item["video"], item.get("caption"), item["pixels"].numpy().tobytes()) for item in loader
    ]


# A spawned worker imports everything again: one is enough.
@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_of_either_start_read_the_same_with_and_without_a_cache(
    manifest, tmp_path, start, workers
):
    options = {"num_frames": 3, "size": 24, "fps": 4}
    plain = [Clips(manifest, "train", **options), CaptionedClips(manifest, "train", **options)]
    wanted = [item for clips in plain for item in loaded(clips)]
    cache = FrameCache(tmp_path, 1 << 30)
    cached = [kind(manifest, "train", cache=cache, **options) for kind in (Clips, CaptionedClips)]
    # What is in the cache, what workers add to it, and what is not there.
    loaded(Subset(cached[0], range(3)))
    items = ConcatDataset([*plain, *cached, *cached])
    found = loaded(items, num_workers=workers, multiprocessing_context=start)
    assert found == [*wanted, *wanted, *wanted]
    assert len(list(tmp_path.glob("??/*.frames"))) == 16


def test_evaluation_reads_every_video_once(manifest):
    clips = Clips(manifest, "val", num_frames=4, size=(16, 24))
    batch = collate([clips[row] for row in range(len(clips))])
    assert batch.keys() == {"pixels", "videos"}
    assert batch["videos"].tolist() == [0]
    path = manifest.path_of(manifest.of_split("val")[0])
    assert batch["pixels"][0].equal(normalize_clip(read_clip(path, 4, (16, 24))))


def test_only_the_part_from_start_to_end_is_read(manifest, tmp_path):
    video = manifest.of_split("test")[0]
    (tmp_path / "m.jsonl").write_text(
        f'{{"video": "{video.video}", "video_id": "v", "captions": ["x"], "split": "train",'
        ' "start": 1.0, "end": 2.0}'
    )
    part = read_manifest(tmp_path / "m.jsonl", manifest.root)
    clip = read_clip(manifest.path_of(video), 4, 24, start=1.0, end=2.0)
    assert Clips(part, "train", num_frames=4, size=24)[0]["pixels"].equal(normalize_clip(clip))
    drawn = CaptionedClips(part, "train", num_frames=4, size=24)[0]["pixels"]
    assert drawn.equal(normalize_clip(clip))


def test_a_clip_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"video": "broken.mp4", "video_id": "a", "captions": ["x"], "split": "train"}\n'
        '{"video": "gone.mp4", "video_id": "b", "captions": ["x"], "split": "train"}\n'
    )
    items = CaptionedClips(read_manifest(path), "train")
    for index, name in enumerate(("broken.mp4", "gone.mp4")):
        with pytest.raises(ClipError, match=name):
            items[(0, index)]


def test_what_cannot_be_is_refused_before_anything_is_read(manifest, tmp_path):
    with pytest.raises(ValueError, match=r"num_frames must be .*, got 0"):
        captioned(manifest, num_frames=0)
    with pytest.raises(ValueError, match=r"fps must be .*, got 0"):
        captioned(manifest, fps=0)
    path = tmp_path / "m.jsonl"
    path.write_text('{"video": "a", "video_id": "a", "captions": [], "split": "val"}')
    with pytest.raises(ValueError, match="expected captions in split 'val', got none"):
        CaptionedClips(read_manifest(path), "val")
    with pytest.raises(ValueError, match=r"split is 'train', but .* with videos are: val$"):
        Clips(read_manifest(path), "train")


NUMBERS = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 40))


@given(NUMBERS, st.integers(0, 9), st.integers(0, 9))
def test_processes_see_together_what_one_sees(numbers, seed, epoch):
    world, batch_size, rest = numbers
    length = world * batch_size + rest
    alone = EpochBatches(length, world * batch_size, seed=seed)
    ranks = [
        EpochBatches(length, batch_size, seed=seed, rank=rank, world=world) for rank in range(world)
    ]
    for sampler in (alone, *ranks):
        sampler.set_epoch(epoch)
        assert len(sampler) == length // (world * batch_size)
    together = [[*chain(*parts)] for parts in zip(*ranks, strict=True)]
    assert together == list(alone)
    seen = [pair for batch in together for pair in batch]
    assert len(seen) == len(set(seen)) == len(alone) * world * batch_size
    assert {e for e, _ in seen} == {epoch}
    assert {i for _, i in seen} <= set(range(length))


@given(NUMBERS, st.data())
def test_a_resumed_epoch_continues_the_order(numbers, data):
    world, batch_size, rest = numbers
    length = world * batch_size + rest
    rank = data.draw(st.integers(0, world - 1))
    sampler = EpochBatches(length, batch_size, rank=rank, world=world)
    whole = list(sampler)
    start = data.draw(st.integers(0, len(whole)))
    sampler.set_epoch(0, start)
    assert len(sampler) == len(whole) - start
    assert list(sampler) == whole[start:]


def test_epochs_and_seeds_shuffle_anew():
    orders = []
    for seed in range(3):
        sampler = EpochBatches(50, 50, seed=seed)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            orders.append(tuple(index for _, index in next(iter(sampler))))
    assert len(set(orders)) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)
    # (1, 23) and (12, 3) are different numbers.
    draws = {int(torch.randint(2**60, (), generator=generator_for(*n))) for n in ((1, 23), (12, 3))}
    assert len(draws) == 2


def test_an_iteration_keeps_the_epoch_that_it_began_with():
    sampler = EpochBatches(4, 2)
    batches = iter(sampler)
    sampler.set_epoch(1)
    assert {epoch for batch in batches for epoch, _ in batch} == {0}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((7, 4, 2, 0), r"one batch of 8 items to train on \(2 processes with batch_size 4\)"),
        ((0, 1, 1, 0), "got 0: lower batch_size"),
        ((9, 0, 1, 0), "batch_size must be .*, got 0"),
        ((9, 1, 0, 0), "world must be .*, got 0"),
        ((9, 1, 2, 2), "rank must be from 0 to 1 for world=2, got 2"),
    ],
)
def test_impossible_batches_are_refused(arguments, text):
    length, batch_size, world, rank = arguments
    with pytest.raises(ValueError, match=text):
        EpochBatches(length, batch_size, world=world, rank=rank)


def test_impossible_places_in_an_epoch_are_refused():
    sampler = EpochBatches(9, 2)
    with pytest.raises(ValueError, match="start must be from 0 to the epoch's 4 batches, got 5"):
        sampler.set_epoch(0, 5)
    with pytest.raises(ValueError, match=r"epoch must be .*, got -1"):
        sampler.set_epoch(-1)
    assert (sampler.epoch, sampler.start) == (0, 0)

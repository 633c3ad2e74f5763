"""The small video world: order in time is the meaning, single frames never tell."""

import json
import os

import av
import pytest
import torch

from tokenmix_ops.video import read_clip
from tokenmix_ops.video.data.manifest import missing, read_manifest
from tokenmix_ops.video.data.shapes import (
    COLOURS,
    MOTIONS,
    SHAPES,
    render,
    sample_scenes,
    write_video,
    write_world,
)


def scenes(count=4000, num_frames=8, seed=0):
    return sample_scenes(count, num_frames, torch.Generator().manual_seed(seed))


def test_shapes_move_where_their_motion_says():
    drawn = scenes()
    moved = drawn.position[:, -1] - drawn.position[:, 0]
    for index, (axis, sign) in enumerate(((0, -1), (0, 1), (1, -1), (1, 1))):
        chosen = moved[drawn.motion == index]
        assert (chosen[:, axis] * sign > 0.3).all()
        assert chosen[:, 1 - axis].eq(0).all()
    steps = drawn.position.diff(dim=1)
    assert torch.allclose(steps, steps[:, :1].expand_as(steps), atol=1e-6)


def test_shapes_stay_inside_the_picture():
    drawn = scenes()
    reach = drawn.radius[:, None, None]
    assert (drawn.position - reach > 0).all()
    assert (drawn.position + reach < 1).all()


def test_a_frame_at_random_is_distributed_alike_for_all_motions():
    drawn = scenes(40_000)
    levels = torch.linspace(0.05, 0.95, 19)
    quantiles = torch.stack(
        [drawn.position[drawn.motion == m].flatten(0, 1).quantile(levels, dim=0) for m in range(4)]
    )
    # 10,000 independent clips a motion: quantiles are good to about a hundredth.
    assert (quantiles - quantiles[0]).abs().max() < 0.015
    for attribute in (drawn.shape, drawn.colour):
        for motion in range(4):
            share = attribute[drawn.motion == motion].bincount() / (drawn.motion == motion).sum()
            assert (share - 1 / len(share)).abs().max() < 0.02


def test_rendering_has_the_colours_and_the_place():
    drawn = scenes(60)
    pictures = render(drawn, 48)
    assert pictures.shape == (60, 8, 3, 48, 48)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    colours = torch.tensor(list(COLOURS.values()))
    for clip in range(60):
        for frame in (0, 7):
            x, y = (drawn.position[clip, frame] * 48).long()
            assert torch.allclose(pictures[clip, frame, :, y, x], colours[drawn.colour[clip]])
            assert torch.allclose(pictures[clip, frame, :, 0, 0], drawn.background[clip])
    assert set(drawn.shape.tolist()) == set(range(len(SHAPES)))


def test_every_outline_covers_about_what_its_radius_says():
    drawn = scenes(200)
    covered = (render(drawn, 64) - drawn.background[:, None, :, None, None]).abs().amax(2) > 0.2
    share = covered.float().mean(dim=(1, 2, 3)) / drawn.radius.square()
    for shape in range(len(SHAPES)):
        assert 1.5 < share[drawn.shape == shape].mean() < 3.5


def test_a_world_is_real_video_files_with_captions(tmp_path):
    seen = []
    path = write_world(tmp_path, 12, seed=3, num_frames=9, size=64, progress=seen.append)
    assert seen == list(range(1, 13))
    annotations = json.loads(path.read_text())
    assert [video["split"] for video in annotations["videos"]] == [
        *["train"] * 8,
        "validate",
        "test",
        "train",
        "train",
    ]
    drawn = scenes(12, 9, 3)
    for index, video in enumerate(annotations["videos"]):
        file = tmp_path / "videos" / f"{video['video_id']}.mp4"
        with av.open(os.fspath(file)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            assert container.streams.video[0].frames == 9
        captions = [
            s["caption"] for s in annotations["sentences"] if s["video_id"] == f"video{index}"
        ]
        motion = MOTIONS[int(drawn.motion[index])]
        assert MOTIONS[video["category"]] == motion
        assert len(captions) == 2
        assert captions[0].endswith(f"moves {motion}")
        clip = read_clip(file, 9, 64)
        wanted = render(drawn, 64)[index]
        assert (clip - wanted).square().mean() < 1e-3
    assert [s["sen_id"] for s in annotations["sentences"]] == list(range(24))


def test_the_manifest_says_what_the_annotations_say(tmp_path):
    path = write_world(tmp_path, 11, seed=3, size=32)
    annotations = json.loads(path.read_text())
    manifest = read_manifest(tmp_path / "videos.jsonl")
    assert [(v.video_id, v.split.replace("val", "validate")) for v in manifest.videos] == [
        (video["video_id"], video["split"]) for video in annotations["videos"]
    ]
    assert [(v.video_id, caption) for v in manifest.videos for caption in v.captions] == [
        (s["video_id"], s["caption"]) for s in annotations["sentences"]
    ]
    assert not any(missing(manifest, split) for split in ("train", "val", "test"))


def test_still_worlds_show_one_picture_and_never_mention_motion(tmp_path):
    write_world(tmp_path, 6, size=32, still=True)
    manifest = read_manifest(tmp_path / "videos.jsonl")
    for video in manifest.videos:
        frames = read_clip(manifest.path_of(video), 8, 32)
        assert (frames - frames[:1]).abs().max() < 0.1
        assert len(video.captions) == 2
    drawn = scenes(200)
    stopped = drawn.stopped(torch.Generator().manual_seed(0))
    assert torch.equal(stopped.position, stopped.position[:, :1].expand_as(stopped.position))
    assert (stopped.position[:, :1] == drawn.position).all(-1).any(-1).all()
    for i in range(200):
        x, y = stopped.position[i, 0]
        across, down = stopped.still_captions(i)
        thing = drawn.captions(i)[0].partition(" moves ")[0]
        assert across == f"{thing} on the {'left' if x < 0.5 else 'right'}"
        assert down == f"there is {thing} at the {'top' if y < 0.5 else 'bottom'}"


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_world(tmp_path / name, 3, seed=seed, size=32)
    files = [sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in "abc"]
    assert {p.name for p in files[0]} >= {"annotations.json", "videos.jsonl", "video2.mp4"}
    contents = [[p.read_bytes() for p in each] for each in files]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"num_videos": 0}, "num_videos must be at least 1, got 0"),
        ({"num_frames": 1}, "num_frames must be at least 2, got 1"),
        ({"size": 33}, "size must be even, got 33"),
        ({"size": 8}, "size must be at least 16, got 8"),
        ({"fps": 0}, "fps must be at least 1, got 0"),
    ],
)
def test_impossible_worlds_are_refused(tmp_path, wrong, text):
    with pytest.raises(ValueError, match=text):
        write_world(tmp_path, **wrong)


def test_a_world_that_ends_early_names_no_video_and_is_replaced(tmp_path):
    write_world(tmp_path, 4, size=32)

    def stop(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path, 3, seed=1, size=32, progress=stop)
    assert json.loads((tmp_path / "annotations.json").read_text())["videos"] == []
    assert not (tmp_path / "videos.jsonl").exists()
    path = write_world(tmp_path, 2, size=32)
    assert len(json.loads(path.read_text())["videos"]) == 2
    assert sorted(p.name for p in (tmp_path / "videos").iterdir()) == ["video0.mp4", "video1.mp4"]


def test_videos_of_others_are_left_alone(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "video0.mp4").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds other files: choose another folder"):
        write_world(tmp_path, 1, size=32)
    assert (tmp_path / "videos" / "video0.mp4").read_bytes() == b"mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "videos.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"videos\.jsonl already exists: choose another folder"):
        write_world(other, 1, size=32)
    assert (other / "videos.jsonl").read_text() == "mine"


def test_frames_of_the_wrong_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"even height, even width\], got \[2, 3, 5, 4\]"):
        write_video(tmp_path / "a.mp4", torch.zeros(2, 3, 5, 4), 4)


def test_a_world_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_world(tmp_path / "file", 1)

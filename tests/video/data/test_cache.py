"""A clip from the cache is the one without, whatever befell the cache; and it keeps its limit."""

import errno
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager, suppress
from functools import partial

import psutil
import pytest
import torch
from media import picture, write_image, write_video

from tokenmix_ops.video.data import cache as module
from tokenmix_ops.video.data import quota, video_file
from tokenmix_ops.video.data.cache import FrameCache
from tokenmix_ops.video.data.clips import Candidates, ClipError, read_clip

SIZE = (24, 32)
FRAME = 3 * 24 * 32
PLENTY = 1 << 30


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4", options={"g": "12"})


@pytest.fixture
def decoded(monkeypatch):
    """Numbers of the frames that were decoded."""
    numbers = []
    read = Candidates.read

    def counting(self, choose):
        for number, image in read(self, choose):
            numbers.append(number)
            yield number, image

    monkeypatch.setattr(Candidates, "read", counting)
    return numbers


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def files(folder):
    return sorted(folder.glob("??/*"))


def used(folder):
    """Bytes of whole blocks."""
    total = 0
    for file in files(folder):
        # Others may be at work.
        with suppress(FileNotFoundError):
            total += -(-file.stat().st_size // 4096) * 4096
    return total


def taken(folder):
    return int((folder / "taken").read_text())


CASES = {
    "uniform": {},
    "more than there are": {"num_frames": 60},
    "random": {"sampling": "random"},
    "random, more than there are": {"sampling": "random", "num_frames": 60},
    "span": {"sampling": "random", "start": 0.55, "end": 3},
    "rate": {"sampling": "random", "fps": 4},
    "span at a rate": {"start": 0.55, "fps": 3.0},
    "square": {"size": 16, "num_frames": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_a_kept_clip_is_the_decoded_one(case, video, tmp_path, decoded):
    arguments = {"num_frames": 8, "size": SIZE, **CASES[case]}
    cache = FrameCache(tmp_path / "new" / "cache", PLENTY)
    plain, through = seeded(), seeded()
    for turn in range(3):
        clip = cache.read_clip(video, **arguments, generator=through)
        assert bool(decoded) == (turn == 0)
        assert torch.equal(clip, read_clip(video, **arguments, generator=plain))
        # Whoever draws further from it goes on alike.
        assert torch.equal(plain.get_state(), through.get_state())
        decoded.clear()
    assert len(files(cache.folder)) == 1
    assert taken(cache.folder) == used(cache.folder)


def test_what_is_kept(video, tmp_path, decoded):
    """All frames to draw from, or just those that are always chosen."""
    cache = FrameCache(tmp_path, PLENTY)
    for arguments, count in (({"sampling": "random"}, 45), ({}, 8), ({"num_frames": 60}, 45)):
        cache.read_clip(video, size=SIZE, **arguments)
        assert len(decoded) == count
        decoded.clear()
    sizes = sorted(file.stat().st_size for file in files(tmp_path))
    assert sizes == [16 + n * (4 + FRAME) for n in (8, 45, 45)]


def test_a_folder_of_images(tmp_path, decoded):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        write_image(folder / f"{i}.jpg", picture(i, 40, 56))
    cache = FrameCache(tmp_path / "cache", PLENTY)

    def check(fps, numbers):
        clip = cache.read_clip(folder, 4, SIZE, "random", generator=seeded(), fps=fps)
        assert len(decoded) == numbers
        assert torch.equal(clip, read_clip(folder, 4, SIZE, "random", generator=seeded()))
        decoded.clear()

    check(None, 12)
    # They have no clock.
    check(2.0, 0)
    write_image(folder / "12.jpg", picture(12, 40, 56))
    check(None, 13)
    write_image(folder / "3.jpg", picture(20, 40, 56))
    check(None, 13)
    with pytest.raises(ClipError, match="a folder of images has no timestamps"):
        cache.read_clip(folder, start=1.0)


def test_another_video_in_its_place_is_read_anew(tmp_path):
    path = write_video(tmp_path / "a.mp4", stamps=range(9))
    cache = FrameCache(tmp_path / "cache", PLENTY)
    before = cache.read_clip(path, 4, SIZE)
    # Of the same size, as far as that goes.
    write_video(tmp_path / "b.mp4", stamps=range(9), options={"qp": "40"}).replace(path)
    clip = cache.read_clip(path, 4, SIZE)
    assert torch.equal(clip, read_clip(path, 4, SIZE))
    assert not torch.equal(clip, before)


def test_a_path_through_a_link_is_where_it_leads(tmp_path):
    """Whose parent is not that of the link."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there" / "deep").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there" / "deep")
    first = write_video(tmp_path / "here" / "a.mp4", stamps=range(9))
    other = write_video(tmp_path / "there" / "a.mp4", stamps=range(9), options={"qp": "40"})
    size = max(path.stat().st_size for path in (first, other))
    for path in (first, other):
        # What follows the last box of a file is no part of the video.
        os.truncate(path, size)
        os.utime(path, (1, 1))
    cache = FrameCache(tmp_path / "cache", PLENTY)
    cache.read_clip(first, 4, SIZE)
    roundabout = tmp_path / "here" / "link" / ".." / "a.mp4"
    assert torch.equal(cache.read_clip(roundabout, 4, SIZE), read_clip(other, 4, SIZE))


def damages(data):
    record = 4 + FRAME
    yield "cut", data[: len(data) // 2]
    yield "cut in its header", data[:7]
    yield "empty", b""
    yield "zeros", bytes(len(data))
    yield "zeros for a frame", data[: 16 + 5 * record] + bytes(record) + data[16 + 6 * record :]
    yield "zeros from a frame on", data[: 16 + 5 * record].ljust(len(data), b"\0")
    yield "one bit", data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]
    yield "frames swapped", data[:16] + data[16 + record :] + data[16 : 16 + record]
    yield "another count", data[:8] + b"\x03" + data[9:]
    yield "something else", b"frames 2" + data[8:]


@pytest.mark.parametrize("number", range(10))
def test_what_is_damaged_is_decoded_anew(number, video, tmp_path, decoded):
    cache = FrameCache(tmp_path, PLENTY)
    wanted = read_clip(video, 45, SIZE)
    cache.read_clip(video, 45, SIZE)
    (file,) = files(tmp_path)
    data = file.read_bytes()
    _, damaged = list(damages(data))[number]
    file.write_bytes(damaged)
    decoded.clear()
    assert torch.equal(cache.read_clip(video, 45, SIZE), wanted)
    assert len(decoded) == 45
    assert file.read_bytes() == data
    assert torch.equal(cache.read_clip(video, 45, SIZE), wanted)
    assert len(decoded) == 45
    assert taken(tmp_path) >= used(tmp_path)


def test_frames_of_another_clip_are_not_taken_for_its_own(video, tmp_path):
    cache = FrameCache(tmp_path, PLENTY)
    cache.read_clip(video, 4, SIZE, end=1.0)
    (first,) = files(tmp_path)
    cache.read_clip(video, 4, SIZE, start=1.0)
    (second,) = set(files(tmp_path)) - {first}
    shutil.copy(first, second)
    clip = cache.read_clip(video, 4, SIZE, start=1.0)
    assert torch.equal(clip, read_clip(video, 4, SIZE, start=1.0))


def damage(path, packet_number):
    import av

    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    victim = packets[packet_number]
    data = bytearray(path.read_bytes())
    data[victim.pos : victim.pos + victim.size] = b"\xa5" * victim.size
    path.write_bytes(data)


def clip_or_error(read, path, generator):
    try:
        return read(path, 1, SIZE, "random", generator=generator)
    except ClipError as error:
        return str(error)


def test_damage_that_a_clip_does_without_does_not_matter(video, tmp_path, decoded):
    path = tmp_path / "a.mp4"
    shutil.copy(video, path)
    damage(path, 20)
    cache = FrameCache(tmp_path / "cache", PLENTY)
    outcomes = set()
    for seed in range(12):
        plain, through = seeded(seed), seeded(seed)
        wanted = clip_or_error(read_clip, path, plain)
        decoded.clear()
        clip = clip_or_error(cache.read_clip, path, through)
        if isinstance(wanted, str):
            assert clip == wanted
            outcomes.add("raises")
        else:
            assert torch.equal(clip, wanted)
            assert seed == 0 or len(decoded) == 1
            outcomes.add("reads")
        # Another caption is drawn next from where this one failed.
        assert torch.equal(plain.get_state(), through.get_state())
    assert outcomes == {"raises", "reads"}
    assert files(cache.folder) == []
    assert taken(cache.folder) == 0


@pytest.mark.parametrize(
    "arguments",
    [{"start": 30.0}, {"path": "gone.mp4"}, {"path": "text.mp4"}, {"path": ""}],
)
def test_errors_are_those_without_it(arguments, video, tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "cache").mkdir()
    cache = FrameCache(tmp_path / "cache", PLENTY)
    path = tmp_path / arguments.pop("path") if "path" in arguments else video
    for sampling in ("uniform", "random"):
        with pytest.raises(ClipError) as wanted:
            read_clip(path, sampling=sampling, **arguments)
        with pytest.raises(ClipError) as caught:
            cache.read_clip(path, sampling=sampling, **arguments)
        assert str(caught.value) == str(wanted.value)
    assert files(cache.folder) == []
    with pytest.raises(ValueError, match=r"fps must be .*, got 0"):
        cache.read_clip(path, fps=0)


def test_frames_that_begin_anew_are_kept_right(video, tmp_path, monkeypatch, decoded):
    """Decoding surprises after some frames; the second time it counts one frame less."""
    real = video_file._decode_chosen

    def surprised(*arguments):
        for turn, item in enumerate(real(*arguments)):
            if turn == 5:
                raise video_file._Surprise
            yield item

    monkeypatch.setattr(video_file, "_decode_chosen", surprised)
    cache = FrameCache(tmp_path, PLENTY)
    for _ in range(2):
        clip = cache.read_clip(video, 8, SIZE, "random", generator=seeded())
        assert torch.equal(clip, read_clip(video, 8, SIZE, "random", generator=seeded()))
    assert taken(tmp_path) == used(tmp_path) == 4096 * -(-(16 + 45 * (4 + FRAME)) // 4096)


def test_frames_are_kept_one_by_one(tmp_path, monkeypatch):
    """However many there are, they are never in memory together."""
    path = write_video(tmp_path / "a.mp4", stamps=range(300))
    process, sizes, read = psutil.Process(), [], Candidates.read

    def measured(self, choose):
        for item in read(self, choose):
            sizes.append(process.memory_info().rss)
            yield item

    monkeypatch.setattr(Candidates, "read", measured)
    FrameCache(tmp_path / "cache", PLENTY).read_clip(path, 2, 320, "random")
    (file,) = files(tmp_path / "cache")
    assert len(sizes) == 300
    assert file.stat().st_size > 90e6
    assert max(sizes) - sizes[0] < 30e6


def test_a_full_cache_takes_no_more_and_still_serves(video, tmp_path, decoded):
    limit = 4 * 4096 + 100
    cache = FrameCache(tmp_path, limit)
    spans = [{"start": i / 2, "end": i / 2 + 0.5} for i in range(6)]
    clips = [read_clip(video, 5, (16, 24), "random", **span, generator=seeded()) for span in spans]
    for turn in range(3):
        for i, (span, wanted) in enumerate(zip(spans, clips, strict=True)):
            decoded.clear()
            clip = cache.read_clip(video, 5, (16, 24), "random", **span, generator=seeded())
            assert torch.equal(clip, wanted)
            assert bool(decoded) == (turn == 0 or i >= 2)
            assert used(tmp_path) <= limit
    assert len(files(tmp_path)) == 2


def test_a_clip_too_large_is_read_without_its_other_frames(video, tmp_path, decoded):
    cache = FrameCache(tmp_path, 40 * FRAME)
    cache.read_clip(video, 8, SIZE, "random")
    assert len(decoded) == 8
    assert files(tmp_path) == []


def test_what_the_dead_left_is_removed_and_what_the_living_write_is_not(video, tmp_path):
    cache = FrameCache(tmp_path, PLENTY)
    living = cache.quota.take(tmp_path / "aa" / "00.frames", 9000)
    with cache.quota.take(tmp_path / "aa" / "11.frames", 5000):
        pass
    (tmp_path / "aa" / "notes.part").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "22.frames.part").touch()
    assert taken(tmp_path) == 3 * 4096 + 2 * 4096
    FrameCache(tmp_path, PLENTY)
    assert taken(tmp_path) == 3 * 4096
    assert [f.name for f in files(tmp_path)] == ["00.frames.part", "notes.part"]
    assert (tmp_path / "mine" / "22.frames.part").exists()
    # Nobody else writes what is being written, and the dead are followed at once.
    assert cache.quota.take(tmp_path / "aa" / "00.frames", 9000) is None
    living.close()
    cache.quota.take(tmp_path / "aa" / "00.frames", 100).close()
    assert taken(tmp_path) == 4096


@pytest.mark.parametrize("text", ["", "0", "\0" * 21, "9" * 20 + "\n", "-" * 20 + "\n"])
def test_a_spoilt_sum_is_counted_anew(text, video, tmp_path):
    cache = FrameCache(tmp_path, PLENTY)
    cache.read_clip(video, 4, SIZE)
    (tmp_path / "taken").write_text(text)
    if text.startswith("9"):
        # Too high is not too low.
        cache = FrameCache(tmp_path, PLENTY)
    cache.read_clip(video, 5, SIZE)
    assert len(files(tmp_path)) == 2
    assert taken(tmp_path) == used(tmp_path)


def child(work):
    """Runs ``work`` in a process of its own, as a loader's worker by fork; returns its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        torch.set_num_threads(1)
        work()
        status = 0
    finally:
        os._exit(status)


def succeeded(*processes):
    return [os.waitpid(process, 0)[1] for process in processes] == [0] * len(processes)


SPANS = [(start / 10, start / 10 + 1.5) for start in range(0, 30, 2)]


def read_all(folder, limit, video, wanted, seed):
    cache = FrameCache(folder, limit)
    spans = list(enumerate(SPANS))
    random.Random(seed).shuffle(spans)
    for i, (start, end) in spans:
        clip = cache.read_clip(video, 6, SIZE, "random", start, end, seeded())
        assert torch.equal(clip, wanted[i])
        assert used(folder) <= limit
        assert cache.adding


@pytest.fixture(scope="module")
def wanted(video):
    return [read_clip(video, 6, SIZE, "random", *span, seeded()) for span in SPANS]


@pytest.mark.parametrize("share", [0.5, 2])
def test_several_processes_fill_one_cache(share, video, wanted, tmp_path):
    limit = int(share * len(SPANS) * 16 * FRAME)

    def work(seed):
        return lambda: [read_all(tmp_path, limit, video, wanted, s) for s in (seed, -seed)]

    assert succeeded(*[child(work(seed)) for seed in range(1, 5)])
    assert used(tmp_path) <= limit
    assert taken(tmp_path) == used(tmp_path)
    assert all(file.suffix == ".frames" for file in files(tmp_path))
    assert len(files(tmp_path)) == len(SPANS) if share > 1 else 0 < len(files(tmp_path)) < 15


def killed_at(line, work):
    """Does the work, but is killed before that line of the cache's own code."""

    def trace(frame, event, _):
        nonlocal line
        if frame.f_code.co_filename not in (module.__file__, quota.__file__):
            return None
        line -= event == "line"
        if line == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    work()


def test_killed_at_any_moment(video, wanted, tmp_path):
    limit = 8 * 17 * FRAME
    chance = random.Random(0)
    unfinished = 0
    for turn in range(40):
        line = chance.randrange(1, 2500)
        work = partial(read_all, tmp_path, limit, video, wanted, turn)
        process = child(partial(killed_at, line, work))
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
        unfinished += any(file.suffix == ".part" for file in files(tmp_path))
        assert used(tmp_path) <= limit
        assert not (tmp_path / "taken").exists() or taken(tmp_path) >= used(tmp_path)
        if turn % 8 == 7:
            read_all(tmp_path, limit, video, wanted, turn)
            assert all(file.suffix == ".frames" for file in files(tmp_path))
        # Room for the next one.
        for file in tmp_path.glob("??/*.frames"):
            file.unlink()
    assert unfinished
    FrameCache(tmp_path, limit)
    assert taken(tmp_path) == used(tmp_path)


@contextmanager
def largest_file(size):
    """What a quota does, or a full disk: writing fails."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_folder_that_cannot_be_written_stops_nothing(video, tmp_path):
    cache = FrameCache(tmp_path, PLENTY)
    cache.read_clip(video, 2, SIZE)
    wanted = read_clip(video, 8, SIZE)
    message = rf"stopped adding frames to the cache {tmp_path}: .*File too large"
    with largest_file(4 * FRAME), pytest.warns(UserWarning, match=message):
        clip = cache.read_clip(video, 8, SIZE)
    assert torch.equal(clip, wanted)
    # Once.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cache.read_clip(video, 8, SIZE), wanted)
        assert torch.equal(cache.read_clip(video, 2, SIZE), read_clip(video, 2, SIZE))
    assert sum(file.suffix == ".frames" for file in files(tmp_path)) == 1
    # Another start clears up.
    FrameCache(tmp_path, PLENTY).read_clip(video, 8, SIZE)
    assert [file.suffix for file in files(tmp_path)] == [".frames"] * 2
    assert taken(tmp_path) == used(tmp_path)


def test_a_disk_that_gets_full_midway(video, tmp_path, monkeypatch):
    write = module._Writer.write

    def full(self, record, image):
        if record == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, record, image)

    monkeypatch.setattr(module._Writer, "write", full)
    cache = FrameCache(tmp_path, PLENTY)
    with pytest.warns(UserWarning, match="No space left on device"):
        clip = cache.read_clip(video, 8, SIZE, "random", generator=seeded())
    assert torch.equal(clip, read_clip(video, 8, SIZE, "random", generator=seeded()))
    assert files(tmp_path) == []
    assert taken(tmp_path) == 0


def test_a_folder_that_cannot_be_made_or_vanishes(video, tmp_path):
    wanted = read_clip(video, 4, SIZE)
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="stopped adding frames .* Not a directory"):
        cache = FrameCache(tmp_path / "file" / "cache", PLENTY)
    assert torch.equal(cache.read_clip(video, 4, SIZE), wanted)
    cache = FrameCache(tmp_path / "cache", PLENTY)
    shutil.rmtree(tmp_path / "cache")
    with pytest.warns(UserWarning, match="stopped adding frames .* No such file or directory"):
        assert torch.equal(cache.read_clip(video, 4, SIZE), wanted)


def test_an_interrupted_fill_leaves_nothing(video, tmp_path, monkeypatch):
    def interrupted(self, record, image):
        raise KeyboardInterrupt

    cache = FrameCache(tmp_path, PLENTY)
    monkeypatch.setattr(module._Writer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.read_clip(video, 4, SIZE)
    assert files(tmp_path) == []
    assert taken(tmp_path) == 0


def test_it_travels_to_workers(video, tmp_path, monkeypatch, decoded):
    monkeypatch.chdir(tmp_path)
    cache = FrameCache("cache", PLENTY)
    cache.read_clip(video, 4, SIZE)
    other = pickle.loads(pickle.dumps(cache))
    monkeypatch.chdir("/")
    decoded.clear()
    other.read_clip(video, 4, SIZE)
    assert not decoded
    # Nor does a worker by fork share a descriptor, on which locks would be shared too.
    held = [open_file.path for open_file in psutil.Process().open_files()]
    assert not [path for path in held if str(tmp_path) in path]


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    for limit in (0, -1, 0.5, True):
        with pytest.raises(ValueError, match=r"max_bytes must be an integer of at least 1, got"):
            FrameCache(tmp_path, limit)
    (tmp_path / "file").touch()
    with pytest.raises(
        NotADirectoryError, match=r"a frame cache needs a folder, but .*file is a file"
    ):
        FrameCache(tmp_path / "file", 1)
    monkeypatch.setattr("tokenmix_ops.video.data.quota.fcntl", None)
    with pytest.raises(RuntimeError, match="needs POSIX file locks"):
        FrameCache(tmp_path, 1)

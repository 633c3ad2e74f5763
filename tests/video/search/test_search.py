"""Search by text: what is indexed, what a kill leaves, who is refused, what is found and shown."""

import base64
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import av
import pytest
import torch
from experiment_runs import experiment, run
from media import picture, write_image, write_video
from safetensors.torch import load_file, save_file
from waiting import wait_until

from tokenmix_ops.video import cli
from tokenmix_ops.video.data.clips import ClipError, normalize_clip, read_clip
from tokenmix_ops.video.experiments.settings import Opening
from tokenmix_ops.video.retrieval import rank
from tokenmix_ops.video.search import SearchModel, search, update_index, updating, write_page
from tokenmix_ops.video.search.finding import find_videos
from tokenmix_ops.video.search.index import DamagedIndex
from tokenmix_ops.video.search.locking import locked

OPENING = Opening(num_frames=2, image_size=32)
FLAGS = ("--num-frames", "2", "--image-size", "32", "--workers", "0")
FILES = ("embeddings.safetensors", "videos.jsonl")
NASTY = "a <b>&\"' [red] 100% #1?.mp4"


@pytest.fixture(autouse=True)
def on_one_core(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(updating, "VIDEOS_IN_A_PART", 2)
    monkeypatch.setattr(updating, "SECONDS_OF_A_PART", math.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(experiment_folder):
    return str(experiment_folder / "retrieval")


@pytest.fixture(scope="module")
def model(checkpoint):
    return SearchModel(checkpoint, OPENING)


@pytest.fixture
def folder(experiment_folder, tmp_path):
    """Five clips, one of them in a folder below; one is also there under another name."""
    world, folder = experiment_folder / "world" / "videos", tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("b.mp4", "c.mp4", NASTY, "more/d.mp4")):
        shutil.copy2(world / f"video{number}.mp4", folder / name)
    shutil.copy2(folder / "b.mp4", folder / "again.mp4")
    return folder


def update(model, folder, index=None, **options):
    return update_index(model, folder, index, workers=0, **options)


def content(index):
    """The files of an index, of which nothing else may be there but the lock."""
    assert {path.name for path in index.iterdir()} == {*FILES, "lock"}
    return [(index / name).read_bytes() for name in FILES]


def lines(index):
    return [json.loads(line) for line in (index / "videos.jsonl").read_text().splitlines()]


def embedded(model, monkeypatch):
    """Counts videos that are embedded from now on."""
    seen, own = [], model.embed_video
    monkeypatch.setattr(model, "embed_video", lambda pixels: (seen.append(1), own(pixels))[1])
    return seen


def read_from_now(monkeypatch):
    """Paths of the videos that are read from now on."""
    paths, own = [], SearchModel.read

    def read(self, chosen, workers):
        paths.extend(chosen)
        return own(self, chosen, workers)

    monkeypatch.setattr(SearchModel, "read", read)
    return paths


def test_an_index_holds_unit_vectors_of_each_video_alone(model, folder):
    found = update(model, folder)
    home = folder / ".tokenmix-search"
    names = [NASTY, "again.mp4", "b.mp4", "c.mp4", "more/d.mp4"]
    assert [entry.video for entry in found.entries] == names
    rows = load_file(home / "embeddings.safetensors")["embeddings"]
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    for row, (line, name) in enumerate(zip(lines(home), names, strict=True)):
        status = (folder / name).stat()
        duration = line.pop("duration")
        assert 0 < duration < 2
        assert line == {
            "video": name,
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "row": row,
        }
        pixels = normalize_clip(read_clip(folder / name, 2, 32))
        with torch.no_grad():
            assert torch.equal(rows[row], model.retriever.embed_videos(pixels[None])[0])
            together = model.retriever.embed_videos(torch.stack([pixels] * 3))[1]
        torch.testing.assert_close(rows[row], together)


def test_workers_and_the_order_of_arrival_change_nothing(model, folder, tmp_path):
    update_index(model, folder, tmp_path / "workers", workers=2)
    late = folder / "c.mp4"
    late.rename(tmp_path / "c.mp4")
    update(model, folder, tmp_path / "late")
    (tmp_path / "c.mp4").rename(late)
    update(model, folder, tmp_path / "late")
    update(model, folder)
    assert content(tmp_path / "workers") == content(folder / ".tokenmix-search")
    assert content(tmp_path / "late") == content(folder / ".tokenmix-search")


def test_only_what_changed_is_embedded(model, folder, tmp_path, monkeypatch):
    seen = embedded(model, monkeypatch)
    home = folder / ".tokenmix-search"
    update(model, folder)
    assert len(seen) == 5
    before, times = content(home), [(home / name).stat().st_mtime_ns for name in FILES]
    update(model, folder)
    assert len(seen) == 5
    assert content(home) == before
    assert times == [(home / name).stat().st_mtime_ns for name in FILES]

    shutil.copy2(folder / "more" / "d.mp4", folder / "new.MP4")
    update(model, folder)
    assert len(seen) == 6
    os.utime(folder / "b.mp4", (1, 1))
    shutil.copy2(folder / "c.mp4", folder / "again.mp4")
    (folder / NASTY).unlink()
    said = []
    found = update(model, folder, say=said.append)
    assert len(seen) == 8
    assert said == ["3 of 5 videos are already indexed"]
    assert [e.video for e in found.entries] == [
        *("again.mp4", "b.mp4", "c.mp4"),
        "more/d.mp4",
        "new.MP4",
    ]
    update(model, folder, tmp_path / "other")
    assert content(home) == content(tmp_path / "other")
    # A deletion alone.
    (folder / "b.mp4").unlink()
    assert len(update(model, folder).entries) == len(lines(home)) == 4


def test_what_cannot_be_read_says_why_and_is_tried_again_when_it_changes(
    model, folder, tmp_path, monkeypatch
):
    (folder / "bad.mp4").write_text("no video")
    (folder / "empty.mkv").touch()
    (folder / "gone.mp4").symlink_to(tmp_path / "nowhere")
    reads = read_from_now(monkeypatch)
    found = update(model, folder)
    assert {entry.video: entry.error for entry in found.unreadable} == {
        "bad.mp4": "cannot be read: Invalid data found when processing input",
        "empty.mkv": "is empty",
        "gone.mp4": "cannot be read: No such file or directory",
    }
    assert len(found.readable) == 5
    bad = lines(folder / ".tokenmix-search")[3]
    assert bad["error"].startswith("cannot be read")
    assert not {"row", "duration"} & bad.keys()
    reads.clear()
    update(model, folder)
    assert not reads
    shutil.copy2(folder / "c.mp4", folder / "bad.mp4")
    found = update(model, folder)
    assert reads == [folder / "bad.mp4"]
    assert len(found.unreadable) == 2


def test_nothing_readable_is_an_index_too(model, tmp_path):
    (tmp_path / "bad.mp4").write_text("no video")
    found = update(model, tmp_path)
    assert update(model, tmp_path) == found
    assert (len(found.readable), len(found.unreadable)) == (0, 1)
    assert search(model, found, ["a circle"])[0].hits == ()


def test_a_video_with_an_embedding_that_is_not_finite_is_refused(model, folder, monkeypatch):
    monkeypatch.setattr(model, "embed_video", lambda _: torch.full((4,), torch.nan))
    with pytest.raises(RuntimeError, match="non-finite embedding: try another --precision"):
        update(model, folder)


def test_videos_are_found_below_without_hidden_ones_loops_and_the_index(model, folder, tmp_path):
    index = folder / "index"
    for name in (".hidden.mp4", ".hidden/a.mp4", "index/a.mp4", "notes.txt", "page.html"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy2(folder / "b.mp4", elsewhere / "far.webm")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "linked too").symlink_to(elsewhere)
    (folder / "more" / "up").symlink_to(folder)
    (folder / "more" / "further up").symlink_to(tmp_path)
    (folder / "e.mp4").symlink_to(folder / "b.mp4")
    images = folder / "images"
    images.mkdir()
    for number in range(3):
        write_image(images / f"{number}.png", picture(number, 32, 32))
    mixed = folder / "mixed"
    mixed.mkdir()
    shutil.copy2(images / "1.png", mixed / "1.png")
    (mixed / "Thumbs.db").touch()
    for other, name in (("photos", "portrait.png"), ("both", "1.png"), ("above", "1.png")):
        (folder / other).mkdir()
        shutil.copy2(images / "1.png", folder / other / name)
    shutil.copy2(folder / "b.mp4", folder / "both" / "f.mp4")
    (folder / "above" / "empty").mkdir()
    found = {one.video: one for one in find_videos(folder, index)}
    names = {NASTY, "again.mp4", "b.mp4", "c.mp4", "e.mp4", "more/d.mp4", "images", "mixed"}
    assert found.keys() == names | {"linked/far.webm", "both/f.mp4"}
    assert found["images"].size == sum(file.stat().st_size for file in images.iterdir())
    shutil.rmtree(index)
    entries = {entry.video: entry for entry in update(model, folder, index).readable}
    assert entries["images"].duration is None
    assert torch.equal(entries["b.mp4"].embedding, entries["e.mp4"].embedding)
    (images / "1.png").unlink()
    os.utime(images, (1, 2_000_000_000))
    changed = {entry.video: entry for entry in update(model, folder, index).readable}
    assert not torch.equal(entries["images"].embedding, changed["images"].embedding)


class Killed:
    """Ends this process by SIGKILL before the ``number``-th step that touches the disk."""

    def __init__(self, number):
        self.left = number
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "rmdir")):
            setattr(owner, name, self.counting(getattr(owner, name)))

    def counting(self, own):
        def call(*arguments, **options):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return own(*arguments, **options)

        return call


def die(number, model, folder, index):
    Killed(number)
    update(model, folder, index)


def test_killed_at_every_step_on_the_disk_it_ends_with_the_same_index(model, folder, tmp_path):
    (folder / "bad.mp4").write_text("no video")
    for name in (NASTY, "again.mp4"):
        (folder / name).unlink()
    update(model, folder, tmp_path / "earlier")
    update(model, folder, tmp_path / "one go")
    os.utime(folder / "b.mp4", (1, 1))
    (folder / "c.mp4").unlink()
    shutil.copy2(folder / "more" / "d.mp4", folder / "e.mp4")
    update(model, folder, tmp_path / "one go")
    wanted = content(tmp_path / "one go")
    fork = multiprocessing.get_context("fork")
    for begun in (False, True):
        for number in range(1, 100):
            index = tmp_path / f"{begun}{number}"
            if begun:
                shutil.copytree(tmp_path / "earlier", index)
            process = fork.Process(target=die, args=(number, model, folder, index))
            process.start()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            update(model, folder, index)
            assert content(index) == wanted, f"killed before step {number}"
            if process.exitcode == 0:
                break
        assert 15 < number < 99


def hang_midway(model, folder, index):
    """Keeps a part of two videos, and hangs with another one embedded."""

    def track(clips, _):
        for number, clip in enumerate(clips):
            while number == 3:
                signal.pause()
            yield clip

    update_index(model, folder, index, workers=2, track=track)


def test_a_process_killed_midway_is_gone_on_with(model, folder, tmp_path):
    index = tmp_path / "index"
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=hang_midway, args=(model, folder, index))
    process.start()
    wait_until(lambda: list(index.glob("parts/*.safetensors")))
    process.kill()
    process.join()
    assert not (index / "videos.jsonl").exists()
    said = []
    # At once, although processes that read for the other one may not have ended.
    update(model, folder, index, say=said.append)
    assert said == ["2 of 5 videos are already indexed"]
    update(model, folder, tmp_path / "one go")
    assert content(index) == content(tmp_path / "one go")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_is_done_and_says_so(model, folder, tmp_path, monkeypatch, number):
    def track(clips, _):
        for count, clip in enumerate(clips, 1):
            if count == 3:
                os.kill(os.getpid(), number)
            yield clip

    said = []
    with pytest.raises(KeyboardInterrupt):
        update(model, folder, tmp_path / "index", track=track, say=said.append)
    assert said == [
        "stopped: 3 of 5 videos are indexed; run the same command to resume",
    ]
    seen = embedded(model, monkeypatch)
    update(model, folder, tmp_path / "index", say=said.append)
    assert said[1] == "3 of 5 videos are already indexed"
    assert len(seen) == 2
    update(model, folder)
    assert content(tmp_path / "index") == content(folder / ".tokenmix-search")


def test_ctrl_c_after_the_last_video_leaves_a_whole_index(model, folder, tmp_path):
    def track(clips, _):
        yield from clips
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        update(model, folder, tmp_path / "index", track=track)
    update(model, folder)
    assert content(tmp_path / "index") == content(folder / ".tokenmix-search")


def test_two_processes_do_not_index_at_once_but_may_search(model, folder):
    home = folder / ".tokenmix-search"
    found = update(model, folder)
    with locked(home, folder):
        assert update(model, folder) == found
        (folder / "b.mp4").unlink()
        with pytest.raises(RuntimeError, match=f"another process is indexing {folder} in {home}: "):
            update(model, folder)
    assert len(update(model, folder).entries) == 4


def damage(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", ["begin", "middle", "end", "cut", "empty", "gone"])
def test_a_damaged_index_is_named_and_can_be_made_anew(model, folder, file, harm):
    update(model, folder)
    home = folder / ".tokenmix-search"
    before, path = content(home), home / file
    size = path.stat().st_size
    if harm in ("begin", "middle", "end"):
        damage(path, {"begin": 0, "middle": size // 2, "end": size - 1}[harm])
    elif harm == "gone":
        path.unlink()
    else:
        os.truncate(path, size // 2 if harm == "cut" else 0)
    for _ in range(2):
        with pytest.raises(DamagedIndex, match=r"rebuild it with --rebuild"):
            update(model, folder)
    update(model, folder, rebuild=True)
    assert content(home) == before


def test_a_damaged_part_is_named_too(model, folder, tmp_path):
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=die, args=(6, model, folder, tmp_path / "index"))
    process.start()
    process.join()
    part = tmp_path / "index" / "parts" / "00000000.safetensors"
    damage(part, part.stat().st_size - 1)
    with pytest.raises(DamagedIndex, match=f"{part} is damaged"):
        update(model, folder, tmp_path / "index")
    update(model, folder, tmp_path / "index", rebuild=True)
    update(model, folder)
    assert content(tmp_path / "index") == content(folder / ".tokenmix-search")


def test_an_index_of_another_model_or_other_settings_is_refused(
    checkpoint, model, folder, tmp_path
):
    update(model, folder)
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    weights = load_file(other / "model.safetensors")
    bias = weights["vision_proj.bias"]
    bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    for what, changed in (
        ("model", SearchModel(str(other), OPENING)),
        (
            "num_frames=2 instead of 3",
            SearchModel(checkpoint, Opening(num_frames=3, image_size=32)),
        ),
        (
            "image_size=32 instead of 48",
            SearchModel(checkpoint, Opening(num_frames=2, image_size=48)),
        ),
        ("precision=no instead of bf16", SearchModel(checkpoint, OPENING, precision="bf16")),
    ):
        with pytest.raises(ValueError, match="another model or other settings") as error:
            update(changed, folder)
        assert what in str(error.value)
        assert "choose another folder with --index, or rebuild it with --rebuild" in str(
            error.value
        )
    update(changed, folder, rebuild=True)
    with pytest.raises(ValueError, match="precision=bf16 instead of no"):
        update(model, folder)


def test_odd_links_do_not_end_the_search(model, folder):
    (folder / "loop").symlink_to("loop")
    (folder / "round.mp4").symlink_to("round.mp4")
    (folder / "through.mp4").symlink_to(folder / "b.mp4" / "x.mp4")
    (folder / "nowhere.mp4").symlink_to("nothing")
    found = update(model, folder)
    assert [entry.video for entry in found.unreadable] == [
        "nowhere.mp4", "round.mp4", "through.mp4"
    ]  # fmt: skip
    assert len(found.readable) == 5
    assert "symbolic links" in found.unreadable[1].error


def test_a_folder_may_be_filled_anew(model, folder):
    update(model, folder)
    for name in (NASTY, "again.mp4", "b.mp4", "more/d.mp4"):
        (folder / name).unlink()
    (folder / "c.mp4").rename(folder / "renamed.mp4")
    assert [entry.video for entry in update(model, folder).entries] == ["renamed.mp4"]


def test_the_last_checkpoint_serves_where_none_was_chosen(checkpoint, folder, tmp_path):
    one = experiment("retrieval", Path(checkpoint).parent, max_steps=1)
    run(one, tmp_path / "run")
    assert not (tmp_path / "run" / "best.safetensors").exists()
    chosen = SearchModel(str(tmp_path / "run" / "last.safetensors"))
    assert SearchModel(str(tmp_path / "run")).settings == chosen.settings


def test_folders_that_cannot_be_or_are_others_are_refused(model, folder, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a folder"):
        update(model, tmp_path / "missing")
    with pytest.raises(
        ValueError, match=r"expected videos in .*, got none: neither files ending in"
    ):
        update(model, tmp_path / "none")
    with pytest.raises(OSError, match=r"cannot be written .* choose another folder with --index"):
        update(model, folder, tmp_path / "file" / "index")
    with pytest.raises(ValueError, match="holds files but no index"):
        update(model, folder, folder / "more", rebuild=True)
    update(model, folder, tmp_path / "index")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy2(folder / "b.mp4", tmp_path / "elsewhere" / "x.mp4")
    with pytest.raises(ValueError, match="indexes 5 videos, none of which is in"):
        update(model, tmp_path / "elsewhere", tmp_path / "index")
    assert len(lines(tmp_path / "index")) == 5
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        update_index(model, folder, workers=-1)


QUERIES = ["A red circle, moves left!", "the blue square goes from top to bottom", "a triangle"]
CLEANED = ["a red circle, moves left", *QUERIES[1:]]


def test_hits_are_the_most_similar_and_ties_are_by_path(model, folder):
    index = update(model, folder)
    answers = search(model, index, QUERIES, top=4)
    ids, mask = model.tokenizer.encode(CLEANED, 35)
    with torch.no_grad():
        texts = model.retriever.embed_texts(ids, mask)
    for answer, query, text in zip(answers, QUERIES, texts, strict=True):
        assert answer.query == query
        wanted = {e.video: float(e.embedding @ text) for e in index.entries}
        assert len(answer.hits) == 4
        for hit in answer.hits:
            assert hit.score == hit.similarity == pytest.approx(wanted[hit.video], abs=1e-5)
            assert hit.path == folder / hit.video
        scores = [hit.score for hit in answer.hits]
        assert scores == sorted(scores, reverse=True)
        assert min(scores) >= sorted(wanted.values())[1] - 1e-5
    whole = search(model, index, QUERIES, top=9)
    assert all(len(answer.hits) == 5 for answer in whole)
    # Queries do not depend on each other.
    assert [search(model, index, [query], top=9)[0] for query in QUERIES] == whole
    for answer in (*whole, *search(model, index, QUERIES, top=5, rerank=5, workers=0)):
        names = [hit.video for hit in answer.hits]
        place = names.index("again.mp4")
        assert names[place + 1] == "b.mp4"
        assert answer.hits[place].score == answer.hits[place + 1].score


@pytest.mark.interfaces
def test_re_ranking_gives_what_rank_gives(model, experiment_folder, tmp_path, monkeypatch):
    folder = tmp_path / "videos"
    shutil.copytree(experiment_folder / "world" / "videos", folder)
    index = update(model, folder)
    names = [entry.video for entry in index.entries]
    pixels = torch.stack([normalize_clip(read_clip(folder / name, 2, 32)) for name in names])
    batch = {"pixels": pixels, "videos": torch.arange(20)}
    texts = model.tokenizer.encode(CLEANED, 35)
    wanted = rank(model.retriever, [batch], *texts, num_videos=20, rerank=8).text_to_video
    read = read_from_now(monkeypatch)
    answers = search(model, index, QUERIES, top=4, rerank=8, workers=0)
    assert len(read) == len(set(read)) < 20
    reordered = 0
    for row, answer in zip(wanted, answers, strict=True):
        best, order = row.topk(4)
        assert [hit.score for hit in answer.hits] == pytest.approx(best.tolist(), abs=1e-5)
        assert [hit.video for hit in answer.hits] == [names[i] for i in order]
        assert all(hit.score != hit.similarity for hit in answer.hits)
        reordered += answer.hits[0].similarity < answer.hits[1].similarity
    assert reordered
    read[0].unlink()
    with pytest.raises(ClipError, match=f"{read[0]}: cannot be read"):
        search(model, index, QUERIES, top=2, rerank=8, workers=0)


def test_queries_and_numbers_that_cannot_be_are_refused(model, folder):
    index = update(model, folder)
    for options, text in (
        ({"top": 0}, "top must be at least 1, got 0"),
        ({"rerank": -1}, "rerank must be .*, got -1"),
        ({"rerank": 3}, r"rerank must be 0 \(off\) or at least top = 5, got 3"),
    ):
        with pytest.raises(ValueError, match=text):
            search(model, index, ["a circle"], **options)
    with pytest.raises(ValueError, match=r"expected words in every query, got '!!! \.'"):
        search(model, index, ["a circle", "!!! ."])


class Page(HTMLParser):
    """Tags with their attributes, and texts by tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_page_holds_all_it_needs_and_leads_to_the_videos(model, folder, tmp_path):
    write_video(folder / "wide.avi", "mpeg4", width=448, height=224, stamps=range(12))
    queries = ["<script>alert(1)</script> & \"red\" 'circle'", "a square"]
    index = update(model, folder)
    path = tmp_path / "pages" / "of #2%" / "found.html"
    path.parent.mkdir(parents=True)
    answers = search(model, index, queries, top=9)
    (folder / "c.mp4").unlink()
    write_page(path, index, answers)
    assert [file.name for file in path.parent.iterdir()] == ["found.html"]
    text = path.read_text("utf-8")
    page = Page(text)
    assert not page.open
    assert page.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in page.all("meta")
    assert page.all("title")
    assert "prefers-color-scheme: dark" in text
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|url\(|@import|\son\w+=", text)
    headings = [data for tag, data in page.texts if tag == "bdi"]
    assert all(query in headings for query in queries)
    assert headings.count(NASTY) == 2

    links = [a["href"] for a in page.all("a") if not a["href"].startswith("#")]
    hits = [hit for answer in answers for hit in answer.hits]
    assert len(links) == len(hits) == 12
    for link, hit in zip(links, hits, strict=True):
        parts = urlsplit(link)
        assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("", "", "", "")
        if hit.video != "c.mp4":
            assert os.path.samefile(hit.path, path.parent / unquote(link))
    images = page.all("img")
    assert len(images) == 2 * 5 * 8
    sizes = set()
    for image in images:
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/jpeg;base64"
        decoder = av.CodecContext.create("mjpeg", "r")
        data = base64.b64decode(data, validate=True)
        (frame,) = decoder.decode(av.Packet(data)) + decoder.decode(None)
        sizes.add((frame.width, frame.height))
        assert re.fullmatch(r".+, frame [1-8] of 8", image["alt"])
    # As large as they are, or made smaller in proportion.
    assert sizes == {(32, 32), (224, 112)}
    assert any("c.mp4: cannot be read" in data for _, data in page.texts)


@pytest.mark.interfaces
def test_a_strip_shows_the_colours_in_order_of_time(model, tmp_path):
    folder = tmp_path / "reds"
    folder.mkdir()
    for number in range(8):
        image = torch.zeros(24, 40, 3, dtype=torch.uint8)
        image[..., 0], image[..., 1] = 30 * number + 20, 60
        write_image(folder / f"{number}.png", image)
    index = update(model, tmp_path)
    write_page(tmp_path / "page.html", index, search(model, index, ["red"]))
    images = Page((tmp_path / "page.html").read_text("utf-8")).all("img")
    for number, image in enumerate(images):
        decoder = av.CodecContext.create("mjpeg", "r")
        data = base64.b64decode(image["src"].partition(",")[2])
        (frame,) = decoder.decode(av.Packet(data)) + decoder.decode(None)
        assert (frame.width, frame.height) == (40, 24)
        colour = frame.to_ndarray(format="rgb24").reshape(-1, 3).mean(axis=0)
        assert abs(colour - [30 * number + 20, 60, 0]).max() < 6


@pytest.fixture
def tokenmix(capsys):
    """(exit status, standard output, standard error) of ``tokenmix retrieval search``."""

    def run(*arguments):
        status = 0
        capsys.readouterr()
        try:
            cli.main(["retrieval", "search", *map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        if isinstance(status, str):
            return 1, captured.out, captured.err + status
        return status, captured.out, captured.err

    return run


def test_a_page_that_cannot_be_written_is_told_before_the_work(tokenmix, checkpoint, folder):
    status, _, err = tokenmix(checkpoint, folder, "a dog", *FLAGS, "--html", folder)
    assert status == 1
    assert "is a folder: name a file" in err
    assert not (folder / ".tokenmix-search").exists()


def test_the_command_prints_json_or_a_table_and_writes_a_page(
    tokenmix, checkpoint, model, folder, tmp_path
):
    (folder / "bad.mp4").write_text("no video")
    broken = os.fsdecode(b"\xff\x1b[1m.mp4")
    shutil.copy2(folder / "c.mp4", folder / broken)
    status, out, err = tokenmix(checkpoint, folder, *FLAGS)
    assert (status, out) == (0, "")
    assert "6 videos are indexed" in err
    assert "1 could not be read" in err
    assert "bad.mp4: cannot be read: Invalid data" in err

    page = tmp_path / "new" / "page.html"
    asked = (checkpoint, folder, *QUERIES, "--top", "6", *FLAGS)
    status, out, _ = tokenmix(*asked, "--rerank", "6", "--json", "--html", page)
    assert status == 0
    answers = search(model, update(model, folder), QUERIES, top=6, rerank=6, workers=0)
    assert json.loads(out) == {
        "queries": [
            {
                "query": answer.query,
                "hits": [
                    {
                        "video": hit.video,
                        "score": hit.score,
                        "similarity": hit.similarity,
                        "path": str(folder / hit.video),
                        "duration": hit.duration,
                    }
                    for hit in answer.hits
                ],
            }
            for answer in answers
        ],
        "videos": 6,
        "unreadable": {entry.video: entry.error for entry in update(model, folder).unreadable},
    }
    text = page.read_text("utf-8")
    assert "%FF%1B%5B1m.mp4" in text
    assert len(Page(text).all("img")) == 3 * 6 * 8

    status, out, _ = tokenmix(*asked)
    assert status == 0
    rows = out.splitlines()
    assert len(rows) == 3 * 8
    assert rows[0] == QUERIES[0]
    assert rows[1].split() == ["score", "seconds", "video"]
    assert any(row.rstrip().endswith(f"{folder}/{NASTY}") for row in rows)
    assert sum("��[1m.mp4" in row for row in rows) == 3


def test_the_command_refuses_in_one_sentence(tokenmix, checkpoint, folder, tmp_path):
    for arguments, text in (
        ((tmp_path / "none",), "is not a folder"),
        ((folder, "--html", tmp_path / "page.html"), "--html shows what is found: give a query"),
        ((folder, "!"), "expected words in every query, got '!'"),
        ((folder, "cat", "--rerank", "2"), "got 2"),
    ):
        status, out, err = tokenmix(checkpoint, *arguments, *FLAGS)
        assert (status, out) == (1, "")
        assert text in err
    assert not (tmp_path / "page.html").exists()

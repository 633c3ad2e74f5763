"""A video's file or folder of images is found by its name, wherever it lies."""

import pytest

from tokenmix_ops.video.data.prepare.locating import scan


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_files_and_folders_of_images(tmp_path):
    touch(tmp_path, "a.mp4", "deep/er/b.MKV", "film/c_00.00.51.926-00.00.54.129.avi")
    touch(tmp_path, "frames/d.1/000.jpg", "frames/d.1/001.JPEG", "frames/e/1.png")
    touch(tmp_path, "cover.jpg", "deep/cover.jpg", "film/thumb.png", "notes.txt", "a.srt")
    touch(tmp_path, ".hidden/f.mp4", "._g.mp4", "deep/.DS_Store")
    library = scan(tmp_path)
    assert {name: library.find(name) for name in library.files} == {
        "a": "a.mp4",
        "b": "deep/er/b.MKV",
        "c_00.00.51.926-00.00.54.129": "film/c_00.00.51.926-00.00.54.129.avi",
        "d.1": "frames/d.1",
        "e": "frames/e",
    }
    assert library.folders == {"frames/d.1", "frames/e"}
    assert library.find("f") is None


def test_the_first_of_several(tmp_path):
    touch(tmp_path, "z/a.avi", "b/a.avi", "a/0.jpg", "a.webm", "a.mp4", "b/c/a.mp4")
    library = scan(tmp_path)
    assert library.files["a"] == ["a.mp4", "a.webm", "a", "b/a.avi", "z/a.avi", "b/c/a.mp4"]
    assert library.find("a") == "a.mp4"


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "videos/a.mp4", "disk/b.mp4", "disk/0.jpg", "frames/1.jpg", "loose/real.avi")
    videos = tmp_path / "videos"
    (videos / "more").symlink_to(tmp_path / "disk")
    (videos / "again").symlink_to(tmp_path / "disk")
    (videos / "round").symlink_to(videos)
    (videos / "c").symlink_to(tmp_path / "frames")
    (videos / "d.avi").symlink_to(tmp_path / "loose" / "real.avi")
    (videos / "broken.mp4").symlink_to(tmp_path / "gone.mp4")
    library = scan(videos)
    assert library.files == {"a": ["a.mp4"], "d": ["d.avi"], "c": ["c"], "b": ["again/b.mp4"]}


def test_numbers_in_names(tmp_path):
    touch(tmp_path, "video12.mp4", "x/video3.avi", "video03.mp4", "none.mp4", "video7/1.jpg")
    # Of these no one digits are all, and at the end.
    touch(tmp_path, "msr12_video4.mp4", "mv89psg6zh4_33_46.avi", "video9b.mp4", "v5_6.mp4")
    library = scan(tmp_path)
    assert library.beginnings == ["video"]
    assert library.numbered(12) == ["video12"]
    assert sorted(library.numbered(3)) == ["video03", "video3"]
    assert library.numbered(7) == ["video7"]
    assert [library.numbered(i) for i in (1, 4, 46, 9, 6)] == [[]] * 5


@pytest.mark.parametrize("other", ["clip9.mp4", "9.mp4", "deep/Video9.mp4"])
def test_numbers_in_names_that_begin_otherwise_are_no_ids(tmp_path, other):
    touch(tmp_path, "video12.mp4", "video3.mp4")
    assert scan(tmp_path).numbered(3) == ["video3"]
    touch(tmp_path, other)
    library = scan(tmp_path)
    assert len(library.beginnings) == 2
    assert [library.numbered(i) for i in (3, 9, 12)] == [[]] * 3


def test_numbers_alone_are_names_too(tmp_path):
    touch(tmp_path, "000012.mp4", "x/7.mp4")
    assert scan(tmp_path).numbered(12) == ["000012"]


def test_paths_without_suffix(tmp_path):
    touch(tmp_path, "a.mp4", "s/a.avi", "s/a.mp4", "s/t/d.1/0.jpg", "s.t/b.c.mkv")
    library = scan(tmp_path)
    assert library.paths("s/a") == ["s/a.avi", "s/a.mp4"]
    assert [library.find(name) for name in ("s/t/d.1", "s.t/b.c")] == ["s/t/d.1", "s.t/b.c.mkv"]
    assert [library.find(name) for name in ("s/t/d", "s/b", "t/a", "s/a.avi")] == [None] * 4


def test_folders_that_are_none(tmp_path):
    touch(tmp_path, "a.mp4")
    for path in (tmp_path / "a.mp4", tmp_path / "gone"):
        with pytest.raises(NotADirectoryError, match="is not a folder: pass the folder of"):
            scan(path)


def test_odd_links_do_not_end_the_search(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "round.mp4").symlink_to("round.mp4")
    (tmp_path / "through.mp4").symlink_to(tmp_path / "a.mp4" / "x.mp4")
    assert scan(tmp_path).files == {"a": ["a.mp4"]}

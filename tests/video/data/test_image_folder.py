"""A folder of images is a clip in the order of its numbers; what cannot be one raises."""

import struct

import pytest
import torch
from media import picture, write_image
from torch.nn.functional import interpolate

from tokenmix_ops.video.data.clips import ClipError, frame_indices, read_clip

pytestmark = pytest.mark.interfaces

SIZE = (24, 32)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG"])
def test_folder_is_ordered_by_number(tmp_path, suffix):
    folder = tmp_path / "100%d video7"
    folder.mkdir()
    for name in ("notes.txt", ".hidden1.jpg", "._frame3.png"):
        (folder / name).write_text("not an image")
    numbers = [2, 10, 11, 100]
    images = [
        write_image(folder / f"clip9_frame{n}{suffix}", picture(n, 40 + n % 3, 56)) for n in numbers
    ]
    resized = torch.cat(
        [interpolate(i[None], SIZE, mode="bicubic", antialias=True).clamp(0, 1) for i in images]
    )
    # Rounded to 8 bits.
    close = {"rtol": 0, "atol": 0.501 / 255 if suffix == ".png" else 0.2}
    torch.testing.assert_close(read_clip(folder, 4, SIZE), resized, **close)
    torch.testing.assert_close(read_clip(folder, 2, SIZE), resized[[0, 2]], **close)
    torch.testing.assert_close(read_clip(folder, 6, SIZE), resized[[0, 0, 1, 2, 2, 3]], **close)
    drawn = frame_indices(4, 2, "random", torch.Generator().manual_seed(3))
    clip = read_clip(folder, 2, SIZE, "random", generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(clip, resized[drawn], **close)


def test_jpeg_orientation(tmp_path):
    path = tmp_path / "1.jpg"
    write_image(path, picture(1, 32, 48))
    plain = read_clip(tmp_path, 1, (32, 48))
    # Orientation 6: turn clockwise by a quarter.
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIII", 0x112, 3, 1, 6, 0)
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])
    assert torch.equal(read_clip(tmp_path, 1, (48, 32)), plain.rot90(-1, (2, 3)))


def empty_folder(folder):
    (folder / "notes.txt").touch()
    return folder, r"has no numbered .jpg, .jpeg or .png images"


def image_without_number(folder):
    write_image(folder / "1.png", picture(1, 16, 16))
    write_image(folder / "cover.png", picture(1, 16, 16))
    return folder / "cover.png", "needs a number in its name for ordering; rename or move it"


def images_of_one_number(folder):
    write_image(folder / "frame1.png", picture(1, 16, 16))
    write_image(folder / "frame01.png", picture(1, 16, 16))
    return folder / "frame1.png", "has the same number as frame01.png; remove one of them"


def text_named_image(folder):
    (folder / "1.jpg").write_text("hello")
    return folder / "1.jpg", "is not a JPEG or PNG image"


def empty_image(folder):
    (folder / "1.png").touch()
    return folder / "1.png", "is not a JPEG or PNG image"


@pytest.mark.parametrize(
    "case",
    [empty_folder, image_without_number, images_of_one_number, text_named_image, empty_image],
)
def test_folder_errors(case, tmp_path, capfd):
    path, reason = case(tmp_path)
    with pytest.raises(ClipError, match=rf"^{path}: {reason}$"):
        read_clip(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.8])
def test_truncated_image(tmp_path, suffix, kept):
    for i in range(3):
        write_image(tmp_path / f"{i}{suffix}", picture(i, 64, 64))
    path = tmp_path / f"1{suffix}"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ClipError, match=rf"^{path}: is damaged"):
        read_clip(tmp_path, 3)
    assert read_clip(tmp_path, 1).shape[0] == 1


def test_folder_has_no_clock(tmp_path):
    write_image(tmp_path / "1.png", picture(1, 16, 16))
    with pytest.raises(ClipError, match=rf"^{tmp_path}: a folder of images has no timestamps"):
        read_clip(tmp_path, end=2.0)


def test_images_count_as_extracted_at_a_rate(tmp_path):
    for i in range(7):
        write_image(tmp_path / f"{i}.png", picture(i, 16, 16))
    assert torch.equal(read_clip(tmp_path, 7, SIZE, fps=0.1), read_clip(tmp_path, 7, SIZE))

"""Videos and images for the tests, written with PyAV."""

from fractions import Fraction
from pathlib import Path

import av
import torch

RATE = 10
# libx265 4.2 writes outside its buffers on pictures of 48x32.
SIDE = 64


def picture(i: int, height: int, width: int) -> torch.Tensor:
    """Blocks that move, so that every frame differs from every other."""
    blocks = torch.randint(
        0, 256, (height // 8 + 1, width // 8 + 1, 3), generator=torch.Generator().manual_seed(0)
    )
    image = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)[:height, :width]
    image = image.roll((i, 3 * i), (0, 1))
    image[..., i % 3] //= 2
    return image.to(torch.uint8)


def rgb_frame(image: torch.Tensor, pts: int = 0) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(image.contiguous().numpy(), format="rgb24")
    frame.pts, frame.time_base = pts, Fraction(1, RATE)
    return frame


def encode(container, encoder, options, stamps, width, height, pix_fmt="yuv420p"):
    stream = container.add_stream(encoder, rate=RATE, options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
    stream.codec_context.thread_count = 1
    stream.codec_context.time_base = Fraction(1, RATE)
    packets = []
    for i, pts in enumerate(stamps):
        packets += stream.encode(rgb_frame(picture(i, height, width), pts))
    return stream, packets + stream.encode()


def write_video(
    path: Path,
    encoder: str = "libx264",
    options: dict[str, str] | None = None,
    stamps=range(45),
    width: int = SIDE,
    height: int = SIDE,
    pix_fmt: str = "yuv420p",
    skip: int = 0,
    movflags: str = "faststart",
) -> Path:
    container_options = {"movflags": movflags} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=container_options) as container:
        _, packets = encode(container, encoder, options or {}, stamps, width, height, pix_fmt)
        for packet in packets[skip:]:
            container.mux(packet)
    return path


def write_streams(path: Path, *streams: tuple[str, int, int, int]) -> Path:
    """Streams of (encoder, side, number of frames, disposition)."""
    with av.open(str(path), "w") as container:
        opened = []
        for encoder, side, length, disposition in streams:
            stream = container.add_stream(encoder, rate=RATE)
            stream.width = stream.height = side
            stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
            stream.disposition = disposition
            opened.append((stream, side, length))
        for stream, side, length in opened:
            for i in range(length):
                container.mux(stream.encode(rgb_frame(picture(i, side, side), i)))
            container.mux(stream.encode())
    return path


def write_image(path: Path, image: torch.Tensor) -> torch.Tensor:
    height, width, _ = image.shape
    png = path.suffix.lower() == ".png"
    encoder = av.CodecContext.create("png" if png else "mjpeg", "w")
    encoder.width, encoder.height, encoder.time_base = width, height, Fraction(1, RATE)
    encoder.pix_fmt = "rgb24" if png else "yuvj444p"
    frame = rgb_frame(image).reformat(format=encoder.pix_fmt, dst_color_range="JPEG")
    path.write_bytes(b"".join(bytes(p) for p in encoder.encode(frame) + encoder.encode(None)))
    return image.permute(2, 0, 1) / 255

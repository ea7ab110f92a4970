"""Frames into a file: `write_video(output.frames[0], "x.mp4", fps=8)`. A .gif needs pillow only, a .mp4 the extra `video`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import RequestError

VIDEO_SUFFIXES = (".mp4", ".gif")
MAX_GIF_FPS = 50  # players take a pause of 1/100 s, the shortest, for a mistake, and play it ten times slower
BT709 = 1  # H.264's number for it, as matrix, primaries and transfer function


def default_video_path() -> Path:
    """`video.mp4` where one can be written, else `video.gif`."""
    return Path("video.mp4" if find_spec("av") else "video.gif")


def check_video_path(path: str | Path, fps: int) -> None:
    """Raises RequestError where `write_video` would, as far as that can be known without frames."""
    suffix = Path(path).suffix.lower()
    if suffix not in VIDEO_SUFFIXES:
        raise RequestError(
            f"{path}: a video is written to a file that ends in {' or '.join(VIDEO_SUFFIXES)}; give such a name"
        )
    if suffix == ".mp4" and find_spec("av") is None:
        raise RequestError(
            f"{path}: an .mp4 needs PyAV: pip install 'prebake[video]', or give a name that ends in .gif"
        )
    if fps < 1 or (suffix == ".gif" and fps > MAX_GIF_FPS):
        most = f" to {MAX_GIF_FPS}, the most that a .gif can play" if suffix == ".gif" else " or more"
        raise RequestError(f"{path}: expected 1{most} frames per second, got {fps}")


def write_video(frames: Sequence[Image.Image], path: str | Path, fps: int = 8) -> None:
    """Writes RGB frames of one size as an endless .gif or a silent .mp4 (H.264), `fps` of them per second.

    Raises RequestError where that cannot be done.
    """
    check_video_path(path, fps)
    if not frames:
        raise RequestError(f"{path}: expected one frame or more, got none")
    try:
        (_write_gif if Path(path).suffix.lower() == ".gif" else _write_mp4)(frames, Path(path), fps)
    except OSError as e:
        raise RequestError(f"{path}: the video could not be written: {e}; give a name in a folder that exists") from e


def _write_gif(frames: Sequence[Image.Image], path: Path, fps: int) -> None:
    """Pauses are whole 1/100 s, so they alternate where `fps` does not divide 100, and the whole lasts what it should.

    Pillow joins equal frames in a row into one with a longer pause.
    """
    ends = [round(100 * i / fps) for i in range(len(frames) + 1)]
    pauses_ms = [10 * (end - start) for start, end in pairwise(ends)]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=pauses_ms, loop=0, optimize=False)


def _write_mp4(frames: Sequence[Image.Image], path: Path, fps: int) -> None:
    """H.264 in yuv420p, which all players know, with its colours named, so that they need not guess them."""
    import av

    width, height = frames[0].size
    if width % 2 or height % 2:
        raise RequestError(
            f"{path}: an .mp4 has an even width and height, the frames are {width} x {height}; give a .gif"
        )
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "17"})  # no loss that is seen
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(np.array(frame.convert("RGB")), format="rgb24")
            container.mux(stream.encode(rgb.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())

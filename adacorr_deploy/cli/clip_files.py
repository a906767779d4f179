"""From sampled clips to files: a folder of PNG frames for each, and a GIF or MP4 that plays."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adacorr_deploy.cli.clip_options import ClipOptions, VideoFormat, check_mp4
from adacorr_deploy.cli.image_files import GRID_NAME, Sampled, grid_png
from adacorr_deploy.runtime.images import levels_from_pixels, picture_from_levels, png_from_picture

_HUNDREDTHS: Final = 100  # a GIF's clock has so many ticks per second
_COLOURS: Final = 256  # of a GIF's frame
_QUALITY: Final = "17"  # x264's constant rate factor: its errors are hardly seen
_LIMITED_RANGE, _BT601, _BT709, _SRGB = 1, 6, 1, 13  # of an MP4's colours, in the numbers of ITU-T H.273
_GREY: Final = 1  # channels

Levels = NDArray[np.uint8]


def clip_files(sampled: Sampled, title: str, options: ClipOptions) -> Mapping[str, bytes]:
    """Return every file by its name: of each clip its frames and its video, last a grid of the clips' middle frames.

    Args:
        sampled: Clips, (B, F, C, H, W) in [−1, 1].
        title: Of the grid.
        options: How they are written.
    """
    files: dict[str, bytes] = {}
    for stem, clip in zip(sampled.naming.stems(), sampled.pixels, strict=True):
        levels = levels_from_pixels(clip)
        content = [png_from_picture(picture_from_levels(frame)) for frame in levels]
        if options.video is not None:
            content.append(_ENCODERS[options.video](levels, options.frame_rate))
        files |= zip(options.names(stem), content, strict=True)
    middle = Sampled(pixels=sampled.pixels[:, options.frames // 2], naming=sampled.naming)
    return {**files, GRID_NAME: grid_png(middle, title)}


def gif_from_levels(levels: Levels, frame_rate: float) -> bytes:
    """Return a GIF of frames (F, H, W, C) in 0 … 255 that repeats for ever.

    Grey frames are exact; of others, each has 256 colours that fit it. Equal frames in a row are one that lasts longer.
    Frames last whole hundredths of a second, so that each begins at most a half of one away from its time.
    """
    first, *others = (_with_palette(frame) for frame in levels)
    ends = [round(_HUNDREDTHS * (frame + 1) / frame_rate) for frame in range(len(levels))]
    durations_ms = [10 * (end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    buffer = io.BytesIO()
    first.save(buffer, format="GIF", save_all=True, append_images=others, duration=durations_ms, loop=0)
    return buffer.getvalue()


def _with_palette(frame: Levels) -> Image.Image:
    picture = picture_from_levels(frame)
    if frame.shape[-1] == _GREY:
        return picture
    return picture.quantize(_COLOURS, method=Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)


def mp4_from_levels(levels: Levels, frame_rate: float) -> bytes:
    """Return an H.264 file of frames (F, H, W, C) in 0 … 255, with one more row or column where their number is odd.

    The same frames give the same bytes.

    Raises:
        RequestError: If the package that writes it is not installed.
    """
    check_mp4()
    import av

    frames = _of_even_size(levels)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as file:
        stream = file.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"  # which every player takes
        stream.options = {"crf": _QUALITY, "threads": "1"}  # another number of threads gives other bytes
        colours = stream.codec_context
        colours.color_range, colours.colorspace = _LIMITED_RANGE, _BT601  # what the frames are converted to
        colours.color_primaries, colours.color_trc = _BT709, _SRGB
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return buffer.getvalue()


def _of_even_size(levels: Levels) -> Levels:
    """Return RGB frames; two rows and columns share their chroma, so an odd last one is repeated."""
    height, width, channels = levels.shape[1:]
    rgb = np.repeat(levels, 3, axis=-1) if channels == _GREY else levels
    return np.pad(rgb, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


_ENCODERS: Final[Mapping[VideoFormat, Callable[[Levels, float], bytes]]] = {
    VideoFormat.GIF: gif_from_levels,
    VideoFormat.MP4: mp4_from_levels,
}

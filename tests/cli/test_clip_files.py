"""Invariant: what is read back of a clip's files is the clip: its frames, their number, size, speed and pixels."""

from __future__ import annotations

import io
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from adacorr_deploy.cli.clip_files import clip_files, gif_from_levels, mp4_from_levels
from adacorr_deploy.cli.clip_options import (
    DEFAULT_FRAME_RATE,
    ClipOptions,
    VideoFormat,
    check_frame_folders,
    clip_options,
)
from adacorr_deploy.cli.image_files import Naming, Sampled
from adacorr_deploy.core.errors import OutputError, RequestError
from adacorr_deploy.core.manifest import Manifest
from adacorr_deploy.runtime.images import levels_from_pixels
from tests.models import model_spec

Levels = NDArray[np.uint8]


def clips(batch: int, frames: int, height: int, width: int, channels: int = 3) -> NDArray[np.float32]:
    """Waves that move, of a speed and colour of their own in every clip: (B, F, C, H, W) in [−1, 1]."""
    axes = [np.arange(length, dtype=np.float32) for length in (batch, frames, channels, height, width)]
    clip, frame, channel, y, x = np.meshgrid(*axes, indexing="ij")
    return np.sin((x + (channel + 1) * y) / 9 + (clip + 1) * frame / 2 + channel).astype(np.float32)


def levels(frames: int, height: int, width: int, channels: int = 3) -> Levels:
    return levels_from_pixels(clips(1, frames, height, width, channels)[0])


def frames_of_gif(content: bytes) -> tuple[Levels, list[int]]:
    """Return RGB frames and how many milliseconds each lasts."""
    with Image.open(io.BytesIO(content)) as file:
        read = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(file)]
    return np.stack([frame for frame, _ in read]), [duration for _, duration in read]


def psnr(found: Levels, expected: Levels) -> float:
    """Of brightness: colours are kept for two rows and columns at a time."""
    weights = np.array([0.299, 0.587, 0.114])
    return float(10 * np.log10(255**2 / np.mean((found @ weights - expected @ weights) ** 2)))


# --- Files -------------------------------------------------------------------------------------------------------


def test_every_frame_is_a_png_of_its_pixels_in_its_clips_folder() -> None:
    pixels = clips(2, 5, 6, 8)
    naming = Naming(labels=(1, 0), class_names=("a cat", "dog"), seed=3)
    files = clip_files(Sampled(pixels=pixels, naming=naming), "t", ClipOptions(frames=5, frame_rate=8.0))
    stems = ("00_dog_seed3", "01_a-cat_seed3")
    assert list(files) == [*(f"{stem}/frame_{frame:03d}.png" for stem in stems for frame in range(5)), "grid.png"]
    for stem, clip in zip(stems, pixels, strict=True):
        for frame, expected in enumerate(clip):
            found = np.asarray(Image.open(io.BytesIO(files[f"{stem}/frame_{frame:03d}.png"])))
            np.testing.assert_array_equal(found, levels_from_pixels(expected))


@pytest.mark.parametrize("video", [*VideoFormat])
def test_a_video_stands_beside_its_frames(video: VideoFormat) -> None:
    pytest.importorskip("av")
    sampled = Sampled(pixels=clips(1, 3, 16, 16), naming=Naming(labels=(0,), class_names=None, seed=0))
    options = ClipOptions(frames=3, frame_rate=8.0, video=video)
    names = list(clip_files(sampled, "t", options))
    assert names == [*options.names("00_class-0_seed0"), "grid.png"]
    assert names[-2] == f"00_class-0_seed0.{video.value}"


def test_as_many_digits_as_frames_need() -> None:
    assert ClipOptions(frames=1001, frame_rate=8.0).names("a")[1000] == "a/frame_1000.png"
    assert ClipOptions(frames=1001, frame_rate=8.0).names("a")[1] == "a/frame_0001.png"


def test_frames_of_a_longer_clip_are_not_mixed_in(tmp_path: Path) -> None:
    names = ClipOptions(frames=4, frame_rate=8.0).names("a")
    check_frame_folders(tmp_path, names)
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    check_frame_folders(tmp_path, [*names, "grid.png"])
    (tmp_path / "frame_009.png").touch()  # not in a clip's folder
    check_frame_folders(tmp_path, [*names, "grid.png"])
    with pytest.raises(OutputError, match=r"frame_003.png is a frame of another clip"):
        check_frame_folders(tmp_path, ClipOptions(frames=3, frame_rate=8.0).names("a"))


# --- GIF ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "largest", "mean"), [(1, 0, 0), (3, 48, 6)])
def test_a_gif_has_the_clips_frames_within_its_palettes_error(channels: int, largest: int, mean: float) -> None:
    expected = levels(5, 30, 44, channels)
    found, _ = frames_of_gif(gif_from_levels(expected, 8.0))
    assert found.shape == (5, 30, 44, 3)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= largest
    assert difference.mean() <= mean


@pytest.mark.parametrize("frame_rate", [8.0, 24.0, 29.97, 50.0])
def test_a_gifs_frames_begin_when_they_should(frame_rate: float) -> None:
    _, durations = frames_of_gif(gif_from_levels(levels(25, 8, 8), frame_rate))
    assert len(durations) == 25
    begins = np.cumsum([0, *durations]) / 1000
    assert np.abs(begins - np.arange(26) / frame_rate).max() <= 0.005 + 1e-9


def test_equal_frames_are_one_that_lasts_as_long() -> None:
    still = np.repeat(levels(1, 8, 8), 4, axis=0)
    found, durations = frames_of_gif(gif_from_levels(np.concatenate([still, levels(2, 8, 8)[1:]]), 8.0))
    assert len(found) == 2
    assert durations == [500, 120]


def test_the_slowest_gif_of_equal_frames_can_be_written() -> None:
    frames = 40
    slowest = frames / 655.0
    assert ClipOptions(frames=frames, frame_rate=slowest, video=VideoFormat.GIF).frame_rate == slowest
    still = np.repeat(levels(1, 8, 8), frames, axis=0)
    found, _ = frames_of_gif(gif_from_levels(still, slowest))
    assert len(found) == 1
    with pytest.raises(RequestError, match=r"allowed are 0.061 … 50"):
        ClipOptions(frames=frames, frame_rate=slowest * 0.99, video=VideoFormat.GIF)


# --- MP4 ---------------------------------------------------------------------------------------------------------


def frames_of_mp4(content: bytes) -> tuple[Levels, Fraction]:
    av = pytest.importorskip("av")
    with av.open(io.BytesIO(content)) as file:
        rate = file.streams.video[0].average_rate
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]), rate


@pytest.mark.parametrize(("frame_rate", "rate"), [(8.0, Fraction(8)), (24000 / 1001, Fraction(24000, 1001))])
def test_an_mp4_has_the_clips_frames_within_its_codecs_error(frame_rate: float, rate: Fraction) -> None:
    pytest.importorskip("av")
    expected = levels(9, 96, 128)
    found, found_rate = frames_of_mp4(mp4_from_levels(expected, frame_rate))
    assert (found.shape, found_rate) == (expected.shape, rate)
    assert psnr(found, expected) > 38
    for frame in range(1, 9):  # in order, each itself
        assert psnr(found[frame], expected[frame]) > psnr(found[frame], expected[frame - 1]) + 6


def test_flat_colours_come_back_as_they_were() -> None:
    """No shift from one table of colours to another: what is left is rounding."""
    pytest.importorskip("av")
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128], [20, 200, 90]], np.uint8)
    expected = np.broadcast_to(colours[:, None, None], (5, 32, 32, 3))
    found, _ = frames_of_mp4(mp4_from_levels(expected, 8.0))
    assert np.abs(found.astype(int) - expected).max() <= 6


def test_an_odd_size_gets_one_more_row_and_column_and_grey_is_grey() -> None:
    pytest.importorskip("av")
    expected = levels(3, 27, 31, channels=1)
    found, _ = frames_of_mp4(mp4_from_levels(expected, 8.0))
    assert found.shape == (3, 28, 32, 3)
    assert psnr(found[:, :27, :31], np.repeat(expected, 3, axis=-1)) > 35


def test_the_same_frames_give_the_same_bytes() -> None:
    pytest.importorskip("av")
    frames = levels(6, 32, 32)
    assert mp4_from_levels(frames, 8.0) == mp4_from_levels(frames.copy(), 8.0)
    assert gif_from_levels(frames, 8.0) == gif_from_levels(frames.copy(), 8.0)


def test_without_its_package_an_mp4_is_refused_before_anything_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(RequestError, match=r"pip install 'adacorr-deploy\[video\]'; or give --video gif"):
        ClipOptions(frames=2, frame_rate=8.0, video=VideoFormat.MP4)
    assert ClipOptions(frames=2, frame_rate=8.0, video=VideoFormat.GIF).video is VideoFormat.GIF


@pytest.mark.parametrize(
    ("frame_rate", "video", "message"),
    [
        (0.0, None, "allowed are 0.01 … 240"),
        (1e-300, VideoFormat.MP4, "allowed are 0.01 … 240"),
        (0.002, VideoFormat.GIF, "allowed are 0.01 … 50"),
        (float("nan"), None, "nan per second"),
        (51.0, VideoFormat.GIF, "… 50. Give another --fps, or --video mp4"),
        (241.0, None, "… 240"),
    ],
)
def test_a_speed_that_can_not_be_played_is_refused(frame_rate: float, video: VideoFormat | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ClipOptions(frames=2, frame_rate=frame_rate, video=video)


def test_a_frame_rate_of_none_is_the_default_and_of_zero_is_refused() -> None:
    model = model_spec(latent_shape=(3, 4, 8, 8), patch=(1, 2, 2))
    manifest_of_clips = cast("Manifest", SimpleNamespace(model=model))
    found = clip_options(manifest_of_clips, None, video=None, frame_rate=None)
    assert found is not None
    assert found.frame_rate == DEFAULT_FRAME_RATE
    with pytest.raises(RequestError, match="The frame rate is 0 per second"):
        clip_options(manifest_of_clips, None, video=None, frame_rate=0.0)

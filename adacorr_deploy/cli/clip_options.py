"""How clips are written: as frames alone, or also as a file that plays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from adacorr_deploy.core.errors import OutputError, RequestError

if TYPE_CHECKING:
    from adacorr_deploy.core.latents import LatentSize
    from adacorr_deploy.core.manifest import Manifest

DEFAULT_FRAME_RATE: Final = 8.0  # frames per second, as those that Latte's pipelines are shown with
MIN_FRAME_RATE: Final = 0.01
MAX_FRAME_RATE: Final = 240.0

_FASTEST_GIF: Final = 50.0  # two ticks of its clock a frame: browsers slow down what has shorter ones
_LONGEST_GIF: Final = 655.0  # seconds: a frame's time has 16 bits, and equal frames are written as one
_CLIP_AXES: Final = 4  # of latents: channels, frames, height, width
_FRAME_FILE: Final = "frame_{:0{}d}.png"


class VideoFormat(str, Enum):
    """Files that play; the value is the ending of their names."""

    GIF = "gif"
    MP4 = "mp4"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipOptions:
    """How clips are written.

    Attributes:
        frames: Of a clip.
        frame_rate: Frames per second.
        video: The file that plays, beside the frames; None: frames alone.

    Raises:
        RequestError: If the format can't play so fast or so slowly, or the package that writes it is missing.
    """

    frames: int
    frame_rate: float
    video: VideoFormat | None = None

    def __post_init__(self) -> None:
        gif = self.video is VideoFormat.GIF
        slowest = max(MIN_FRAME_RATE, self.frames / _LONGEST_GIF) if gif else MIN_FRAME_RATE
        fastest = _FASTEST_GIF if gif else MAX_FRAME_RATE
        if not slowest <= self.frame_rate <= fastest:
            other = ", or --video mp4" if gif else ""
            raise RequestError(
                f"The frame rate is {self.frame_rate:g} per second, allowed are {slowest:.2g} … {fastest:g}. Give "
                f"another --fps{other}."
            )
        if self.video is VideoFormat.MP4:
            check_mp4()

    def names(self, stem: str) -> list[str]:
        """Return what a clip's files are called: its frames, in a folder of their own, then the video."""
        digits = max(3, len(str(self.frames - 1)))
        frames = [f"{stem}/{_FRAME_FILE.format(frame, digits)}" for frame in range(self.frames)]
        return [*frames, *([f"{stem}.{self.video.value}"] if self.video is not None else [])]


def clip_options(
    manifest: Manifest, size: LatentSize | None, *, video: VideoFormat | None, frame_rate: float | None
) -> ClipOptions | None:
    """Return how a request's clips are written; None of a model that makes images.

    Args:
        manifest: Of the bundle.
        size: Of the request's latents.
        video: See `ClipOptions`.
        frame_rate: Of the request, or None for the default.

    Raises:
        RequestError: If a video or a frame rate is asked of images, or the options don't go together.
    """
    shape = manifest.model.latents.shape_at(size)
    if len(shape) == _CLIP_AXES:
        rate = DEFAULT_FRAME_RATE if frame_rate is None else frame_rate
        return ClipOptions(frames=shape[1], frame_rate=rate, video=video)
    if video is not None or frame_rate is not None:
        raise RequestError(f"{manifest.model_name} makes images, which have no frames. Leave --video and --fps out.")
    return None


def check_frame_folders(directory: Path, names: Iterable[str]) -> None:
    """Refuse folders that hold frames of a longer clip: the new ones and those would look like one.

    Raises:
        OutputError: Naming the first such frame.
    """
    paths = [directory / name for name in names]
    for folder in sorted({path.parent for path in paths} - {directory}):
        if others := sorted(set(folder.glob("frame_*.png")) - set(paths)):
            raise OutputError(
                f"{others[0]} is a frame of another clip, which a new one would be mixed with. Remove {folder}, or "
                "choose another folder with -o."
            )


def check_mp4() -> None:
    """Refuse MP4 files where the package that writes them is missing.

    Raises:
        RequestError: With the command that installs it.
    """
    try:
        import av  # noqa: F401  only asked whether it is there
    except ImportError as error:
        raise RequestError(
            f"MP4 files need the package av, which can't be imported ({error}). Install it with: "
            "pip install 'adacorr-deploy[video]'; or give --video gif."
        ) from error

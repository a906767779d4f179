"""What a run leaves: pictures or clips, latents and a trace; refused before anything is sampled, or written as one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adacorr_deploy.cli.clip_options import check_frame_folders
from adacorr_deploy.cli.console import say, show_lines, show_table
from adacorr_deploy.core.errors import RequestError

if TYPE_CHECKING:
    from adacorr_deploy.caching.policy import Policy
    from adacorr_deploy.cli.clip_options import ClipOptions
    from adacorr_deploy.cli.image_files import Naming, Sampled
    from adacorr_deploy.core.manifest import Manifest
    from adacorr_deploy.runtime import SampleRequest, SampleResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where the results go."""

    directory: Path | None  # of the pictures
    latents: Path | None
    trace: Path | None

    @property
    def wanted(self) -> bool:
        return any(path is not None for path in (self.directory, self.latents, self.trace))

    def check(self, pictures: Sequence[str], *, bundle: Path, inputs: Sequence[Path]) -> None:
        """Refuse what can't be written, before anything is sampled.

        Raises:
            OutputError: See `check_outputs`.
            RequestError: If nothing would be kept.
        """
        from adacorr_deploy.cli.output_files import check_outputs

        if self.directory is None and self.latents is None:
            raise RequestError("Nothing would be kept. Give a folder for the images with -o, or --save-latents.")
        images = [self.directory / name for name in pictures] if self.directory is not None else []
        others = [path for path in (self.latents, self.trace) if path is not None]
        check_outputs([*images, *others], bundle=bundle, inputs=inputs)
        if self.directory is not None:
            check_frame_folders(self.directory, pictures)
        if self.latents is not None and self.latents.suffix != ".npy":
            raise RequestError(f"Latents are kept as .npy, not as {self.latents}. Give a name that ends in .npy.")

    def check_pixels(self, manifest: Manifest) -> None:
        """Refuse a run that asks for images alone of a bundle that gives none.

        Raises:
            RequestError: Saying how to keep the latents, or to get images.
        """
        from adacorr_deploy.runtime.images import gives_images

        if not gives_images(manifest) and self.latents is None:
            raise RequestError(
                f"This model's latents have {manifest.model.latent_shape[0]} channels: they become images through a "
                "VAE, which this bundle doesn't hold. Keep the latents with --save-latents OUT.npy, or rebuild the "
                "bundle with: adacorr-build MODEL --vae PATH"
            )

    def pictures(
        self, manifest: Manifest, sampled: Sampled, title: str, clips: ClipOptions | None
    ) -> dict[Path, bytes]:
        """Return the files of images or clips by their paths: none where they aren't wanted, or there are none."""
        from adacorr_deploy.cli.clip_files import clip_files
        from adacorr_deploy.cli.image_files import png_files
        from adacorr_deploy.runtime.images import gives_images

        if self.directory is None:
            return {}
        if not gives_images(manifest):
            say("note: no images, as this bundle holds no VAE (adacorr-build --vae); the latents are kept")
            return {}
        files = png_files(sampled, title) if clips is None else clip_files(sampled, title, clips)
        return {self.directory / name: content for name, content in files.items()}

    def write(self, pictures: Mapping[Path, bytes], result: SampleResult) -> None:
        """Write every output, all or none.

        Raises:
            OutputError: If one can't be written.
        """
        from adacorr_deploy.cli.latents_file import npy_from_latents
        from adacorr_deploy.cli.output_files import write_files

        files = dict(pictures)
        if self.latents is not None:
            files[self.latents] = npy_from_latents(result.latents)
        if self.trace is not None:
            files[self.trace] = result.trace.to_json().encode()
        write_files(files)

    def show(self, pictures: Collection[Path], policy: Policy, result: SampleResult) -> None:
        """Print what the run took, and where its outputs are."""
        show_table(
            ("policy", "steps", "ρ", "launches", "seconds"),
            [(policy.name, result.steps, result.rho, result.launches, result.seconds)],
        )
        if pictures and self.directory is not None:
            *files, grid = pictures
            folders = {path.parent for path in files} - {self.directory}
            clips = f"{len(folders)} clips in {self.directory}: " if folders else ""
            show_lines(f"{clips}{len(files)} {'files' if folders else 'images'} and {grid}")
        show_lines(*(str(path) for path in (self.latents, self.trace) if path is not None))


def naming_of(manifest: Manifest, request: SampleRequest, prompts: Sequence[str]) -> Naming:
    """Return what a request's images are called: after their classes, or the prompts that were given."""
    from adacorr_deploy.cli.image_files import Naming

    if request.prompts is not None:
        return Naming.of_prompts(prompts, request.batch, seed=request.seed)
    return Naming(labels=request.labels, class_names=manifest.class_names, seed=request.seed)


def picture_names(naming: Naming, clips: ClipOptions | None) -> list[str]:
    """Return the names of all files of images or clips, and of the grid."""
    from adacorr_deploy.cli.image_files import GRID_NAME

    files = naming.file_names() if clips is None else [name for stem in naming.stems() for name in clips.names(stem)]
    return [*files, GRID_NAME]

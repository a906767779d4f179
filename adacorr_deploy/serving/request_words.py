"""What a repository's README says of the fields that depend on the model."""

from __future__ import annotations

from collections.abc import Iterator

from adacorr_deploy.core.manifest import Manifest
from adacorr_deploy.core.shapes import FRAMES, HEIGHT, WIDTH
from adacorr_deploy.runtime.image_size import image_ranges
from adacorr_deploy.runtime.images import gives_images
from adacorr_deploy.serving.tensors import inputs_for


def asked_of_client(manifest: Manifest, max_images: int) -> str:
    """Return what client.py is told of a request to try."""
    return _example(manifest, max_images)[0]


def words_for(manifest: Manifest, max_images: int) -> dict[str, str]:
    """Return the words of the template that say what a request asks for, and examples of it."""
    asked, asked_json = _example(manifest, max_images)
    embeddings = manifest.model.conditions.prompt is not None and manifest.text_encoder is None
    rows = "\n".join(f"| {field} | {meaning} | {default} |" for field, meaning, default in _rows(manifest, max_images))
    return {
        "client_packages": "'tritonclient[grpc]'" + (" safetensors" if embeddings else ""),
        "asked": asked,
        "asked_json": asked_json,
        "given": "png_base64" if gives_images(manifest) else "latents",
        "condition_rows": rows,
    }


def _example(manifest: Manifest, max_images: int) -> tuple[str, str]:
    """Return a request as client.py is told it, and as JSON."""
    model = manifest.model
    if model.num_classes:
        labels = sorted({min(label, model.num_classes - 1) for label in (0, 3, 7)})[:max_images]
        asked, asked_json = " ".join(map(str, labels)), f'"class_labels": {labels[:2]}'
    elif manifest.text_encoder is not None:
        asked, asked_json = "--prompt 'a red dog'", '"prompts": ["a red dog"]'
    else:
        asked, asked_json = "--embeddings FILE.safetensors", '"prompt_embeddings": …, "prompt_mask": …'
    if model.conditions.frame_rate:
        asked, asked_json = f"{asked} --fps 24", f'{asked_json}, "frame_rate": 24'
    return asked, asked_json


def _rows(manifest: Manifest, max_images: int) -> Iterator[tuple[str, str, str]]:
    names = {field.name for field in inputs_for(manifest)}
    model = manifest.model
    if "class_labels" in names:
        last = model.num_classes - 1
        yield "`class_labels`", f"1 to {max_images} whole numbers from 0 to {last}, one image each", "refused"
    if "prompts" in names:
        yield "`prompts`", f"1 to {max_images} texts, one image each", "embeddings are needed"
        yield (
            "`negative_prompts`",
            "what guidance leads away from: one for all images or one for each",
            "the empty text",
        )
    if (prompt := model.conditions.prompt) is not None:
        shape = f"(images, {prompt.tokens}, {prompt.width})"
        yield (
            "`prompt_embeddings`, `prompt_mask`",
            (
                f"in place of prompts, what the text encoder makes of them: float32 {shape}, and int64 (images, "
                f"{prompt.tokens}), 1 where a token is real; 1 to {max_images} images"
            ),
            "prompts are needed" if "prompts" in names else "refused",
        )
        yield (
            "`negative_embeddings`, `negative_mask`",
            "the same of the negative prompts, for all images or for each",
            "the empty text" if manifest.null_prompt is not None else "refused, but for guidance 1",
        )
    ranges = image_ranges(manifest)
    if "size" in names:
        width, height = ranges[WIDTH], ranges[HEIGHT]
        yield "`size`", f"pixels: a width of {width}; a height of {height}", f"{width.default}, {height.default}"
    if "frames" in names:
        yield "`frames`", f"of a clip: {ranges[FRAMES]}", str(ranges[FRAMES].default)
    if "frame_rate" in names:
        yield "`frame_rate`", "of a clip, frames per second", "refused"

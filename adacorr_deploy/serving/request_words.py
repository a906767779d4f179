"""What a repository's README says of the fields that depend on the model."""

from __future__ import annotations

from collections.abc import Iterator

from adacorr_deploy.core.manifest import Manifest
from adacorr_deploy.core.shapes import FRAMES, HEIGHT, WIDTH
from adacorr_deploy.runtime.image_size import image_ranges
from adacorr_deploy.serving.tensors import inputs_for


def words_for(manifest: Manifest, max_images: int) -> dict[str, str]:
    """Return the words of the template that say what a request asks for, and examples of it."""
    if manifest.model.num_classes:
        asked, asked_json = "0 3 7", '"class_labels": [0, 3]'
    elif manifest.text_encoder is not None:
        asked, asked_json = "--prompt 'a red dog'", '"prompts": ["a red dog"]'
    else:
        asked, asked_json = "--embeddings FILE.safetensors", '"prompt_embeddings": …, "prompt_mask": …'
    rows = "\n".join(f"| {field} | {meaning} | {default} |" for field, meaning, default in _rows(manifest, max_images))
    return {"asked": asked, "asked_json": asked_json, "condition_rows": rows}


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

"""What a run is asked for, as people write it: prompts, files of prompts or embeddings, and sizes in pixels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.cli.options import MAX_IMAGES
from adacorr_deploy.core.errors import BackendUnavailableError, RequestError
from adacorr_deploy.core.prompts import MAX_PROMPT
from adacorr_deploy.core.untrusted import bounded_file, clipped

if TYPE_CHECKING:
    from adacorr_deploy.core.specs import PromptSpec
    from adacorr_deploy.runtime import Pipeline
    from adacorr_deploy.runtime.conditions import Prompts

EMBEDDINGS_SUFFIX: Final = ".safetensors"
_EMBEDDINGS, _MASK = "prompt_embeddings", "prompt_mask"
_NEGATIVE_EMBEDDINGS, _NEGATIVE_MASK = "negative_embeddings", "negative_mask"
_KNOWN: Final = (_EMBEDDINGS, _MASK, _NEGATIVE_EMBEDDINGS, _NEGATIVE_MASK)
_FLOATS: Final = (np.float32, np.float16, np.float64)
_SLACK_BYTES: Final = 1 << 20  # of a header


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the images of a run are to show; only one of prompts and embeddings."""

    prompts: Sequence[str] = ()
    negative: Sequence[str] = ()
    embeddings: Path | None = None

    @property
    def anything(self) -> bool:
        return bool(self.prompts or self.negative or self.embeddings)


def prompts_asked_for(pipeline: Pipeline, asked: Asked, *, labels: bool, guidance: float) -> Prompts | None:
    """Return what a run's images are to show, encoded; None of a model that takes class labels.

    Args:
        pipeline: Encodes.
        asked: Prompts, or embeddings.
        labels: Whether class labels were given.
        guidance: 1 has no use for negative prompts.

    Raises:
        RequestError: If the model takes none of this, or needs it and lacks it.
    """
    manifest = pipeline.manifest
    prompt = manifest.model.conditions.prompt
    if prompt is None:
        if asked.anything:
            raise RequestError(
                f"{manifest.model_name} takes no prompts but class labels, 0 … {manifest.model.num_classes - 1}. "
                "Give --class-labels."
            )
        return None
    if labels:
        raise RequestError(
            f"{manifest.model_name} takes no class labels but prompts. Give --prompt TEXT or --embeddings "
            f"FILE{EMBEDDINGS_SUFFIX}."
        )
    if asked.negative and guidance == 1.0:
        raise RequestError("--negative-prompt is given, and guidance 1 leads away from nothing. Leave one of them out.")
    if asked.prompts and asked.embeddings is not None:
        raise RequestError("--prompt and --embeddings both say what the images show. Give one of them.")
    if asked.embeddings is not None:
        found = prompts_from_embeddings(asked.embeddings, prompt)
        if asked.negative and found.negative is not None:
            raise RequestError(
                f"--negative-prompt is given, and {asked.embeddings} holds {_NEGATIVE_EMBEDDINGS}, too. Leave one out."
            )
        return replace(found, negative=pipeline.encode(asked.negative)) if asked.negative else found
    if not asked.prompts:
        raise RequestError(
            f"{manifest.model_name} needs a prompt for each image. Give --prompt TEXT, or --embeddings "
            f"FILE{EMBEDDINGS_SUFFIX}."
        )
    if len(asked.prompts) > MAX_IMAGES:
        raise RequestError(f"{len(asked.prompts)} prompts were given, allowed are {MAX_IMAGES}. Take several runs.")
    return pipeline.encode(asked.prompts, asked.negative)


@contextmanager
def opened_with_prompts(bundle: Path, backend: str | None, prompts: Path | None) -> Iterator[Pipeline]:
    """Open a bundle whose measurements go through the prompts of a file; None: random ones, or class labels.

    Raises:
        AdaCorrError: As `Pipeline.open` and `prompts_from_file`.
    """
    from adacorr_deploy.runtime import Pipeline

    with Pipeline.open(bundle, backend=backend) as pipeline:
        pipeline.example_prompts = prompts_from_file(pipeline, prompts)
        yield pipeline


def prompts_from_file(pipeline: Pipeline, path: Path | None) -> Prompts | None:
    """Return the prompts that measurements go through: a text file's, one a line, or embeddings'; None of None.

    Raises:
        RequestError: If the file can't be read or holds none, or the model takes none.
    """
    if path is None:
        return None
    prompt = pipeline.manifest.model.conditions.prompt
    if prompt is None:
        raise RequestError(f"{pipeline.manifest.model_name} takes no prompts but class labels. Leave --prompts out.")
    if path.suffix == EMBEDDINGS_SUFFIX:
        return prompts_from_embeddings(path, prompt)
    try:
        text = bounded_file(path, limit_bytes=4 * MAX_IMAGES * (MAX_PROMPT + 1)).decode("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(
            f"{path} can't be read as prompts: {reason}. Give a text file with a prompt a line, or embeddings as "
            f"{EMBEDDINGS_SUFFIX}."
        ) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not 1 <= len(lines) <= MAX_IMAGES:
        raise RequestError(f"{path} holds {len(lines)} prompts, allowed are 1 … {MAX_IMAGES}, one a line.")
    return pipeline.encode(lines)


def prompts_from_embeddings(path: Path, prompt: PromptSpec) -> Prompts:
    """Read a file of embeddings (docs/bundle.md), whose numbers the request checks.

    Raises:
        RequestError: If it can't be read, or holds other tensors.
        BackendUnavailableError: If the package safetensors is not installed.
    """
    from adacorr_deploy.runtime.conditions import Prompts, check_prompts

    tensors = _tensors(path, prompt)
    if unknown := sorted(tensors.keys() - set(_KNOWN)):
        raise RequestError(f"{path} holds a tensor {clipped(unknown[0])}, allowed are {', '.join(_KNOWN)}.")
    found = Prompts(embeddings=_floats(path, tensors, _EMBEDDINGS), mask=_whole_numbers(path, tensors, _MASK))
    check_prompts(found, prompt, name=str(path))
    if len(found) > MAX_IMAGES:
        raise RequestError(f"{path} holds {len(found)} prompts, allowed are {MAX_IMAGES}. Take several files.")
    if tensors.keys() & {_NEGATIVE_EMBEDDINGS, _NEGATIVE_MASK}:
        negative = Prompts(
            embeddings=_floats(path, tensors, _NEGATIVE_EMBEDDINGS),
            mask=_whole_numbers(path, tensors, _NEGATIVE_MASK),
        )
        check_prompts(negative, prompt, name=f"{path}: negative")
        found = replace(found, negative=negative)
    return found


def _tensors(path: Path, prompt: PromptSpec) -> Mapping[str, NDArray[np.generic]]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            "Embeddings from a file need the package safetensors, which is not installed. Install it with: "
            "pip install 'adacorr-deploy[text]'"
        ) from error
    of_prompt = prompt.tokens * (prompt.width + 1) * np.dtype(np.float64).itemsize
    try:
        return load(bounded_file(path, limit_bytes=2 * MAX_IMAGES * of_prompt + _SLACK_BYTES))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        if isinstance(error, KeyError):
            reason = f"NumPy has no {clipped(error.args[0])[1:-1]}, allowed are F32, F16 and F64"
        raise RequestError(
            f"{path} can't be read as embeddings: {reason}. Give a safetensors file with {_EMBEDDINGS} and {_MASK}."
        ) from error


def _tensor(path: Path, tensors: Mapping[str, NDArray[np.generic]], name: str) -> NDArray[np.generic]:
    if name not in tensors:
        raise RequestError(f"{path} lacks the tensor {name}; it holds {', '.join(sorted(tensors)) or 'none'}.")
    return tensors[name]


def _floats(path: Path, tensors: Mapping[str, NDArray[np.generic]], name: str) -> NDArray[np.float32]:
    tensor = _tensor(path, tensors, name)
    if tensor.dtype not in _FLOATS:
        raise RequestError(f"{path}: {name} is {tensor.dtype}, allowed are float32, float16 and float64.")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which the check of the numbers refuses
        return tensor.astype(np.float32)


def _whole_numbers(path: Path, tensors: Mapping[str, NDArray[np.generic]], name: str) -> NDArray[np.int64]:
    tensor = _tensor(path, tensors, name)
    if tensor.dtype.kind not in "biu":
        raise RequestError(f"{path}: {name} is {tensor.dtype}, allowed are whole numbers or bool.")
    return tensor.astype(np.int64)


def pixels_from_text(text: str | None) -> tuple[int, int] | None:
    """Return width and height of `WxH`; None of None.

    Raises:
        RequestError: If it is none.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,6})[x×]([0-9]{1,6})", text.strip())
    if found is None:
        raise RequestError(f"--size is {clipped(text)}, allowed is WIDTHxHEIGHT in pixels, as 512x768.")
    return int(found[1]), int(found[2])

"""Reading weights that nobody vouches for: tensors only, checked before anything is built from them."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adacorr_deploy.core.errors import CheckpointError
from adacorr_deploy.exporters.mapped_file import release_pages, tensors_from_safetensors

StateDict = dict[str, Tensor]
_Model = TypeVar("_Model", bound=nn.Module)

_WEIGHTS: Final = "diffusion_pytorch_model"
_TRAINING_KEYS: Final = ("ema", "model", "state_dict")  # of a training checkpoint; averaged weights sample best
_FLOAT_TYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SHOWN: Final = 3  # keys named in a message


def state_dict_from_files(paths: Sequence[Path], *, as_stored: bool = False) -> StateDict:
    """Read weight files (one, or the shards of one checkpoint) into one state dict; safetensors stay memory-mapped.

    Args:
        paths: The files.
        as_stored: Keep the tensors' own types, which takes no memory, in place of float32.

    Raises:
        CheckpointError: If a file is missing, truncated, of another kind, or holds anything but floating-point tensors.
    """
    state: StateDict = {}
    for path in paths:
        read = _READERS.get(path.suffix)
        if read is None:
            raise CheckpointError(
                f"{path}: no weight file ends in {path.suffix!r}. Known: {', '.join(_READERS)}. "
                "Convert it to safetensors."
            )
        if not path.is_file():
            raise CheckpointError(f"{path} is missing. Copy the checkpoint again, with all its files.")
        state.update(read(path))
    return state if as_stored else {name: value.float() for name, value in state.items()}


def checkpoint_sha256(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of the files' contents, one after the other in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda each: each.name):
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def weight_files(folder: Path, names: Sequence[str] = (_WEIGHTS,)) -> list[Path]:
    """Return the weight files of a model's folder, sharded or not.

    Args:
        folder: Of the model.
        names: That its library gives weights; diffusers' by default.

    Raises:
        CheckpointError: If it holds none.
    """
    for file in (folder / f"{name}{suffix}" for suffix in (".safetensors", ".bin") for name in names):
        if (index := file.with_name(f"{file.name}.index.json")).exists():
            return shards_from_index(index)
        if file.exists():
            return [file]
    raise CheckpointError(f"{folder} holds no {names[0]}.safetensors. Copy the checkpoint again, with all its files.")


def shards_from_index(index: Path) -> list[Path]:
    """Return the shards that a `*.safetensors.index.json` lists, each a file beside it.

    Raises:
        CheckpointError: If it isn't such an index, or a shard lies elsewhere.
    """
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of weight shards ({error!r}). Copy it again.") from error
    if outside := sorted(name for name in names if Path(name).name != name):
        raise CheckpointError(f"{index}: shard {outside[0]!r} isn't a file beside it. Don't trust this checkpoint.")
    return [index.parent / name for name in sorted(names)]


def require_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, where: str, model: str) -> None:
    """Check names and shapes against `expected` (whose values may live on the meta device), and that all is finite.

    Raises:
        CheckpointError: Saying which keys are missing, unexpected, of a wrong shape, or not finite.
    """
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    if missing or unexpected:
        kinds = {"missing": missing, "unexpected": unexpected}
        found = "; ".join(f"{len(keys)} {kind}: {_named(keys)}" for kind, keys in kinds.items() if keys)
        raise CheckpointError(f"{where} doesn't hold the weights of {model}: {found}. Check that they belong together.")
    for key, reference in expected.items():
        if state[key].shape != reference.shape:
            raise CheckpointError(
                f"{where}: {key} has shape {tuple(state[key].shape)}, {model} needs {tuple(reference.shape)}. "
                "Check that the weights and the configuration belong together."
            )
        if not torch.isfinite(state[key]).all():
            raise CheckpointError(f"{where}: {key} holds NaN or infinity. Save it again from its training.")
        release_pages()


def shape_of(state: StateDict, key: str, rank: int, *, where: str, model: str) -> tuple[int, ...]:
    """Return the shape of a weight that tells a model's size.

    Raises:
        CheckpointError: If the weight is missing, or has not so many axes or an empty one.
    """
    if key not in state:
        raise CheckpointError(f"{where} lacks {key}, which {model} has. Check that it is one.")
    shape = tuple(state[key].shape)
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"{where}: {key} has shape {shape}, {model} needs {rank} axes. Check the checkpoint.")
    return shape


def with_weights(model: _Model, state: StateDict, *, where: str, name: str) -> _Model:
    """Return a model of the meta device with a checkpoint's weights in it, which are not copied.

    Raises:
        CheckpointError: As `require_tensors`.
    """
    require_tensors(state, model.state_dict(), where=where, model=name)
    model.load_state_dict(state, assign=True, strict=True)
    return model.eval().requires_grad_(False)


def _named(keys: Sequence[str]) -> str:
    rest = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + rest


def _read_safetensors(path: Path) -> StateDict:
    try:
        with safe_open(path, framework="pt"):  # checks the header: sizes, order, and that the file is whole
            return _tensors_only(tensors_from_safetensors(path).items(), path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}). Copy it again.") from error


def _read_pickle(path: Path) -> StateDict:
    try:
        # A training checkpoint of facebookresearch/DiT also holds its command line: a Namespace is a bag of attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # bytes that nobody vouches for can make the unpickler raise anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))  # PyTorch's own message advises to load it unsafely
        reason = (
            f"it holds {refused[1]}, which isn't tensors and never run"
            if refused
            else "it is truncated, no checkpoint, or more than tensors"
        )
        raise CheckpointError(
            f"{path} can't be loaded as tensors alone: {reason}. Copy it again, or save its state dict as safetensors."
        ) from error
    for key in _TRAINING_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a state dict (name → tensor, or such a dict under "
            f"{', '.join(_TRAINING_KEYS)}). Save model.state_dict()."
        )
    return _tensors_only(content.items(), path)


def _tensors_only(items: Iterable[tuple[object, object]], path: Path) -> StateDict:
    """Check every item."""
    state: StateDict = {}
    for key, value in items:
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} isn't a state dict: {key!r} holds a {type(value).__name__}, not a tensor. "
                "Save model.state_dict()."
            )
        if value.dtype not in _FLOAT_TYPES or value.layout != torch.strided or value.is_meta:
            raise CheckpointError(
                f"{path}: {key} is {value.dtype} ({value.layout}, {value.device}); "
                "weights must be dense floating point. Save the model without quantisation."
            )
        state[key] = value.detach()
    return state


_READERS: Final[Mapping[str, Callable[[Path], StateDict]]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_pickle,
    ".pth": _read_pickle,
    ".bin": _read_pickle,
}

"""Folders of pipelines, and reading configurations that nobody vouches for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from adacorr_deploy.core.errors import AdaCorrError
from adacorr_deploy.core.untrusted import clipped

PIPELINE_INDEX: Final = "model_index.json"  # of a diffusers pipeline's folder
_MAX_CONFIG_BYTES: Final = 16 << 20


def json_object(file: Path, error_type: type[AdaCorrError]) -> Mapping[str, object]:
    """Read a JSON object of bounded size."""
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError(f"larger than {_MAX_CONFIG_BYTES} bytes")
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_each_key_once)
    except (OSError, ValueError, RecursionError) as error:
        raise error_type(f"{file} can't be read as JSON ({error}). Copy it again.") from error
    if not isinstance(content, dict):
        raise error_type(f"{file} holds a {type(content).__name__}, not a JSON object. Copy it again.")
    return content


def _each_key_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make a JSON object; Python's own reader would silently take the last value of a key."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {clipped(twice)} stands there twice")
    return content


def folder_in_pipeline(path: Path, name: str) -> Path | None:
    """Return where a pipeline keeps one of its models; None where it has none, or `path` is no pipeline's folder."""
    folder = path / name
    return folder if (path / PIPELINE_INDEX).exists() and folder.is_dir() else None

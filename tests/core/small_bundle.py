"""A bundle of one part, small enough to be written for every test, and its manifest as anybody could edit it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adacorr_deploy.core.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest, file_record

SPEC = {"name": "embed", "inputs": [], "outputs": []}
MODEL = {
    "family": "dit",
    "precision": "float32",
    "latents": {"shape": [1, 4, 4], "patch": [2, 2]},
    "width": 8,
    "conditions": {"num_classes": 2},
    "blocks": [["attention", "mlp"]],
    "units": [2],
    "learned_variance": False,
}


def write_bundle(path: Path) -> Path:
    """Write `parts/embed.onnx`, with its weights beside it, and return the bundle's folder."""
    (path / "parts").mkdir(parents=True)
    files = {}
    for name, content in (("parts/embed.onnx", b"graph"), ("parts/embed.safetensors", b"weights")):
        (path / name).write_bytes(content)
        files[name] = file_record(path / name).model_dump()
    part = {"spec": SPEC, "onnx": "parts/embed.onnx", "artefact": "parts/embed.onnx", "build_seconds": 0}
    manifest = Manifest.model_validate(
        {
            "schema_version": SCHEMA_VERSION,
            "model_name": "tiny",
            "model": MODEL,
            "checkpoint_sha256": "0" * 64,
            "schedule": {"betas": [0.1, 0.2]},
            "backend": "fake",
            "parts": {"embed": part},
            "files": files,
            "tool_versions": {},
        }
    )
    (path / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return path


def raw_manifest(path: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((path / MANIFEST_NAME).read_text())
    return raw

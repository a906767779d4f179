"""What adacorr-build --inspect shows of a bundle: its parts, what they were compiled into, and where the time went."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from adacorr_deploy.cli.console import show_json, show_lines, show_table

if TYPE_CHECKING:
    from adacorr_deploy.core.bundle import Bundle
    from adacorr_deploy.core.manifest import Manifest


def inspect_bundle(path: Path, *, as_json: bool) -> None:
    """Print what a bundle holds; every file's hash is checked first, and nothing is opened by an engine.

    Raises:
        BundleError: If the folder is no bundle, or a file is missing, altered or not listed.
    """
    from adacorr_deploy.core.bundle import open_bundle

    bundle = open_bundle(path)
    if as_json:
        show_json(_document(bundle))
        return
    manifest = bundle.manifest
    plans = Counter(part.artefact for part in manifest.parts.values())
    show_table(
        ("part", "artefact", "kB", "shared by", "weights kB", "seconds", "sha256"),
        [
            (
                name,
                part.artefact,
                f"{manifest.files[part.artefact].size_bytes / 1e3:.1f}",
                plans[part.artefact],
                f"{_weight_bytes(manifest, name) / 1e3:.1f}",
                f"{part.build_seconds:.2f}",
                manifest.files[part.artefact].sha256[:12],
            )
            for name, part in manifest.parts.items()
        ],
    )
    show_lines(*_summary(bundle))


def _summary(bundle: Bundle) -> list[str]:
    manifest, build = bundle.manifest, bundle.manifest.engine_build
    compiled = sum(part.build_seconds for part in manifest.parts.values())
    size_bytes = sum(record.size_bytes for record in manifest.files.values())
    lines = [
        (
            f"{bundle.path}: {manifest.model_name}, {manifest.model.precision.value}, {manifest.backend}, "
            f"{len(manifest.files)} files of {size_bytes / 1e6:.1f} MB, every hash as listed"
        ),
        f"checkpoint sha256 {manifest.checkpoint_sha256}",
        f"build: {manifest.export_seconds:.1f} s exporting, {compiled:.1f} s compiling",
        "tools: " + ", ".join(f"{name} {version}" for name, version in sorted(manifest.tool_versions.items())),
    ]
    if (decoder := manifest.decoder) is not None:
        height, width = decoder.tile
        chunk = "" if decoder.frames == 1 else f", {decoder.frames} frames at once"
        lines.append(
            f"decoder: {decoder.precision.value}, {height} × {width} latents to {decoder.scale * height} × "
            f"{decoder.scale * width} pixels at once, overlap {decoder.overlap}{chunk}; VAE sha256 {decoder.vae_sha256}"
        )
    if (encoder := manifest.text_encoder) is not None and (prompt := manifest.model.conditions.prompt) is not None:
        lines.append(
            f"text encoder: {encoder.precision.value}, {prompt.tokens} tokens of {encoder.vocabulary} to embeddings "
            f"of width {prompt.width}; weights sha256 {encoder.sha256}"
        )
    if build is not None:
        axes = ", ".join(
            f"{name} {low}–{high} (tuned for {tuned})" for name, (low, tuned, high) in build.profile.axes().items()
        )
        lines.insert(
            1,
            f"engines: {manifest.backend} {build.version}, for {', '.join(build.targets) or 'its default GPUs'}, "
            f"weights {build.weights.value}; {axes}",
        )
    return lines


def _document(bundle: Bundle) -> dict[str, object]:
    manifest, build = bundle.manifest, bundle.manifest.engine_build
    return {
        "bundle": str(bundle.path),
        "model": manifest.model_name,
        "checkpoint_sha256": manifest.checkpoint_sha256,
        "backend": manifest.backend,
        "precision": manifest.model.precision.value,
        "bytes": sum(record.size_bytes for record in manifest.files.values()),
        "export_seconds": manifest.export_seconds,
        "compile_seconds": sum(part.build_seconds for part in manifest.parts.values()),
        "engines": None if build is None else build.model_dump(mode="json"),
        "tool_versions": manifest.tool_versions,
        "decoder": None if manifest.decoder is None else asdict(manifest.decoder),
        "text_encoder": None if manifest.text_encoder is None else asdict(manifest.text_encoder),
        "parts": [
            {
                "name": name,
                "onnx": part.onnx,
                "artefact": part.artefact,
                "bytes": manifest.files[part.artefact].size_bytes,
                "sha256": manifest.files[part.artefact].sha256,
                "weights": part.weights,
                "weight_bytes": _weight_bytes(manifest, name),
                "seconds": part.build_seconds,
            }
            for name, part in manifest.parts.items()
        ],
    }


def _weight_bytes(manifest: Manifest, part: str) -> int:
    """Return the size of a part's weight file, which lies beside its ONNX file; service parts have none."""
    file = str(Path(manifest.parts[part].onnx).with_suffix(".safetensors"))
    return manifest.files[file].size_bytes if file in manifest.files else 0

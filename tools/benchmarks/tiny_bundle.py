"""A bundle of a random model so small that a server's own work is what takes the time."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from models import GUIDANCE, loaded_dit, random_dit

from adacorr_deploy.engines import backend_by_name
from adacorr_deploy.exporters.bundle_builder import BuildOptions, build_bundle
from adacorr_deploy.quality.calibrate import CalibrationOptions
from adacorr_deploy.quality.policy_calibration import store_calibration
from adacorr_deploy.runtime import Pipeline

STEPS: Final = 6  # that it is calibrated for


def write_tiny_bundle(path: Path) -> Path:
    """Build a DiT of three blocks and nine tokens, whose latents are grey pixels, and calibrate it."""
    loaded = loaded_dit("random-DiT", random_dit(16, 3, 2, 12, patch=4, channels=1))
    build_bundle(loaded, path, backend_by_name("onnxruntime"), BuildOptions())
    with Pipeline.open(path) as pipeline:
        store_calibration(pipeline, CalibrationOptions(steps=STEPS, guidance=GUIDANCE, images=2))
    return path

"""From a checkpoint to ONNX parts: one adapter per model family."""

from adacorr_deploy.core.progress import Progress
from adacorr_deploy.exporters.adapter import EXPORTERS, ExportableModel, ModelAdapter
from adacorr_deploy.exporters.checkpoints import LoadedModel, load_checkpoint
from adacorr_deploy.exporters.dit_original import diffusers_from_original, original_from_diffusers
from adacorr_deploy.exporters.onnx_parts import export_parts, monolithic_step_onnx, reference_modules

__all__ = [  # noqa: RUF022  grouped by use
    # Checkpoints
    "LoadedModel",
    "diffusers_from_original",
    "load_checkpoint",
    "original_from_diffusers",
    # Export
    "Progress",
    "export_parts",
    "monolithic_step_onnx",
    "reference_modules",
    # Families
    "EXPORTERS",
    "ExportableModel",
    "ModelAdapter",
]

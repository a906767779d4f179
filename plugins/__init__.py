"""The validity-and-blend op: its NumPy oracle, its ONNX functions, its CUDA kernels and the service parts they make."""

from __future__ import annotations

from adacorr_deploy.plugins.kernels import (
    KERNELS,
    KernelLaunch,
    KernelSpec,
    kernel_launch,
    kernel_of_part,
    noise_spec,
)
from adacorr_deploy.plugins.service_parts import (
    MAX_EVALUATIONS,
    SIGNALS_PART,
    blend_part_name,
    combine_part_name,
    common_unit_count,
    modulated_part_name,
    predict_part_name,
    probe_part_name,
    service_part_specs,
)

__all__ = [
    "KERNELS",
    "MAX_EVALUATIONS",
    "SIGNALS_PART",
    "KernelLaunch",
    "KernelSpec",
    "blend_part_name",
    "combine_part_name",
    "common_unit_count",
    "kernel_launch",
    "kernel_of_part",
    "modulated_part_name",
    "noise_spec",
    "predict_part_name",
    "probe_part_name",
    "service_part_specs",
]

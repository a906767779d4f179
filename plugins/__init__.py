"""The validity-and-blend op: its NumPy oracle, its ONNX functions and the service parts made of them."""

from __future__ import annotations

from adacorr_deploy.plugins.service_parts import (
    MAX_EVALUATIONS,
    SIGNALS_PART,
    blend_part_name,
    common_block_count,
    predict_part_name,
    service_part_specs,
)

__all__ = [
    "MAX_EVALUATIONS",
    "SIGNALS_PART",
    "blend_part_name",
    "common_block_count",
    "predict_part_name",
    "service_part_specs",
]

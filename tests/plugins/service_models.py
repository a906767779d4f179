"""Models of every size that the tests of the plugins need, and how to run a service part in ONNX Runtime."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from adacorr_deploy.core.specs import DType, ModelSpec
from adacorr_deploy.plugins.onnx_service_parts import service_parts
from tests.models import model_spec as any_model_spec

PRECISIONS = (DType.FLOAT32, DType.FLOAT16)


def model_spec(
    *, tokens: int = 7, width: int = 8, units: tuple[int, ...] = (2,), precision: DType = DType.FLOAT32
) -> ModelSpec:
    return any_model_spec(latent_shape=(1, tokens, 1), patch=(1, 1), width=width, units=units, precision=precision)


@functools.cache
def session(model: ModelSpec, part: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(service_parts(model)[part][1].SerializeToString(), options)


def run(model: ModelSpec, part: str, **inputs: NDArray[np.generic]) -> list[NDArray[np.floating]]:
    """Return the outputs of a service part; the inputs are passed by their contract names."""
    outputs: list[NDArray[np.floating]] = session(model, part).run(None, inputs)
    return outputs

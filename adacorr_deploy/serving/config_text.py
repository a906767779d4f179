"""Triton's model configurations, written by way of their own message type, so that what is written can be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from adacorr_deploy.core.errors import BackendUnavailableError
from adacorr_deploy.serving.tensors import INPUTS, OUTPUTS, TensorField

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

STREAM_SUFFIX: Final = "_stream"


class Machine(str, Enum):
    """Where a model runs."""

    GPU = "gpu"
    CPU = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """What differs between the configurations of one model."""

    name: str
    machine: Machine
    backend: str  # engines; empty for those that the bundle was built for
    inputs: tuple[TensorField, ...] = INPUTS  # that its requests may have
    outputs: tuple[TensorField, ...] = OUTPUTS


def sampling_config(choice: ModelChoice) -> str:
    """Return the config.pbtxt of the model that samples.

    Raises:
        BackendUnavailableError: If tritonclient is not installed.
    """
    config = _python_model(choice.name, choice.machine, choice.inputs, choice.outputs)
    config.parameters["backend"].string_value = choice.backend
    return _text(config)


def stream_config(
    model: str, inputs: tuple[TensorField, ...] = INPUTS, outputs: tuple[TensorField, ...] = OUTPUTS
) -> str:
    """Return the config.pbtxt of the model that streams what `model` samples.

    Raises:
        BackendUnavailableError: If tritonclient is not installed.
    """
    config = _python_model(f"{model}{STREAM_SUFFIX}", Machine.CPU, inputs, outputs)
    config.model_transaction_policy.decoupled = True
    config.parameters["model"].string_value = model
    return _text(config)


def _python_model(
    name: str, machine: Machine, inputs: Sequence[TensorField], outputs: Sequence[TensorField]
) -> ModelConfig:
    with _tritonclient():
        from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup
    config = ModelConfig(name=name, backend="python", max_batch_size=0)  # requests share launches inside the model
    _add_tensors(config, inputs, outputs)
    group = config.instance_group.add(count=1)  # one engine: a second would hold everything twice
    if machine is Machine.GPU:
        group.kind = ModelInstanceGroup.KIND_GPU
        group.gpus.append(0)
    else:
        group.kind = ModelInstanceGroup.KIND_CPU
    return config


def _add_tensors(config: ModelConfig, inputs: Sequence[TensorField], outputs: Sequence[TensorField]) -> None:
    from tritonclient.grpc.model_config_pb2 import DataType

    for field in inputs:
        datatype = DataType.Value(f"TYPE_{field.datatype}")
        config.input.add(name=field.name, data_type=datatype, dims=field.dims, optional=True)
    for field in outputs:
        config.output.add(name=field.name, data_type=DataType.Value(f"TYPE_{field.datatype}"), dims=field.dims)


def _text(config: ModelConfig) -> str:
    """Return a configuration in protobuf's text format, checked by reading it again."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    text: str = text_format.MessageToString(config)
    again = text_format.Parse(text, ModelConfig())
    if again != config:
        raise AssertionError(f"{config.name}: its configuration reads back as another one")
    return text


@contextmanager
def _tritonclient() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise BackendUnavailableError(
            f"adacorr-serve needs the package tritonclient, which is not installed ({error}). "
            "Install it with: pip install 'adacorr-deploy[serve]'"
        ) from error

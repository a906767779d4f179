"""Configurations say what the server's own message type understands: names, shapes, machine, and one engine alone."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from adacorr_deploy.core.bundle import Bundle
from adacorr_deploy.serving.config_text import Machine, ModelChoice, sampling_config, stream_config
from adacorr_deploy.serving.repository import configs
from adacorr_deploy.serving.tensors import INPUTS, OUTPUTS


@pytest.mark.parametrize(
    ("machine", "kind"), [(Machine.GPU, ModelInstanceGroup.KIND_GPU), (Machine.CPU, ModelInstanceGroup.KIND_CPU)]
)
def test_a_model_that_samples_has_one_engine_and_every_field(machine: Machine, kind: int) -> None:
    text = sampling_config(ModelChoice(name="demo", machine=machine, backend="onnxruntime"))
    config = text_format.Parse(text, ModelConfig())
    assert [(group.kind, group.count) for group in config.instance_group] == [(kind, 1)]
    assert (config.name, config.backend, config.max_batch_size) == ("demo", "python", 0)
    assert config.parameters["backend"].string_value == "onnxruntime"
    assert [field.name for field in config.input] == [field.name for field in INPUTS]
    assert [field.name for field in config.output] == [field.name for field in OUTPUTS]
    assert all(field.optional for field in config.input)
    assert not config.model_transaction_policy.decoupled  # or plain gRPC calls are refused


def test_the_gpus_configuration_of_a_compiled_bundle_names_its_backend(served_bundle: Bundle) -> None:
    compiled = served_bundle.manifest.model_copy(update={"backend": "tensorrt"})
    texts = configs("demo", compiled)
    assert [*texts] == ["demo/config.pbtxt", "demo/configs/cpu.pbtxt", "demo_stream/config.pbtxt"]
    gpu, cpu, stream = (text_format.Parse(text, ModelConfig()) for text in texts.values())
    assert [(group.kind, group.count, [*group.gpus]) for group in gpu.instance_group] == [
        (ModelInstanceGroup.KIND_GPU, 1, [0])
    ]
    assert gpu.parameters["backend"].string_value == "tensorrt"
    assert cpu.parameters["backend"].string_value == "onnxruntime"  # opens the ONNX files beside the plans
    assert [group.kind for group in stream.instance_group] == [ModelInstanceGroup.KIND_CPU]
    assert all(each.IsInitialized() for each in (gpu, cpu, stream))


def test_a_stream_takes_the_same_request_and_names_its_model() -> None:
    sampling = text_format.Parse(
        sampling_config(ModelChoice(name="demo", machine=Machine.CPU, backend="")), ModelConfig()
    )
    stream = text_format.Parse(stream_config("demo"), ModelConfig())
    assert (stream.name, stream.parameters["model"].string_value) == ("demo_stream", "demo")
    assert stream.model_transaction_policy.decoupled
    assert list(stream.input) == list(sampling.input)
    assert list(stream.output) == list(sampling.output)


def test_every_datatype_is_one_of_the_servers() -> None:
    for field in (*INPUTS, *OUTPUTS):
        assert DataType.Value(f"TYPE_{field.datatype}") != DataType.TYPE_INVALID

"""The torch backend keeps the protocol of the compiled ones, and agrees with them on the service parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.engines.backend import Artefact, Backend
from adacorr_deploy.engines.host_memory import HostBuffer
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
from adacorr_deploy.engines.torch_reference import TorchBackend
from adacorr_deploy.plugins.onnx_service_parts import service_parts
from tests.engines.onnx_graphs import WIDTH, part_spec, tensor
from tests.models import model_spec

MODEL = model_spec(latent_shape=(1, 7, 1), patch=(1, 1))
SIZES = {"rows": 3, "steps": 4}
NOWHERE = Path("not-read.onnx")


class Scale(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Predict(torch.nn.Module):
    def forward(
        self,
        tokens: torch.Tensor,
        history: torch.Tensor,
        modulation: torch.Tensor,
        gate_steps: torch.Tensor,
        coefficients: torch.Tensor,
    ) -> torch.Tensor:
        gates = modulation[gate_steps][:, :, [2, 5]] * coefficients[:, None, None, None]  # (T, R, U, D)
        return tokens + torch.einsum("trud,turnd->rnd", gates, history)


class Signals(torch.nn.Module):
    def forward(self, tokens: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor]:
        distance = (tokens - reference).norm(dim=2)
        ratio = distance / (reference.norm(dim=2) + 1e-6)
        spread, spread_ref = (x.std(dim=2, correction=0).mean(1) for x in (tokens, reference))
        columns = (
            ratio.square().mean(1).sqrt(),
            ratio.amax(1),
            (spread - spread_ref).abs() / (spread_ref + 1e-6),
            distance.mean(1),
            spread,
            (tokens - reference).abs().mean((1, 2)),
            reference.abs().mean((1, 2)),
            (tokens - reference).square().mean((1, 2)),
            reference.square().mean((1, 2)),
        )
        return (torch.stack(columns, dim=1),)


def results(backend: Backend, path: Path, spec: PartSpec) -> list[NDArray[np.float64]]:
    """Run a part over inputs that depend on the tensor's name alone."""
    buffers = {}
    for item in (*spec.inputs, *spec.outputs):
        buffers[item.name] = backend.allocate(item.resolved(SIZES), item.dtype)
    for item in spec.inputs:
        rng = np.random.default_rng(list(item.name.encode()))
        values = rng.standard_normal(item.resolved(SIZES)) if item.dtype is not DType.INT64 else rng.integers(0, 4, 2)
        buffers[item.name].write(values.astype(item.dtype.numpy))
    backend.open(Artefact(path=path), spec).bind(buffers).run()
    return [buffers[item.name].read().astype(np.float64) for item in spec.outputs]


@pytest.mark.parametrize(("part", "module"), [("predict_2", Predict()), ("signals", Signals())])
def test_both_backends_agree_on_the_service_parts(tmp_path: Path, part: str, module: torch.nn.Module) -> None:
    spec, proto = service_parts(MODEL)[part]
    onnx.save(proto, tmp_path / "part.onnx")
    engine = results(OnnxRuntimeBackend(threads=1), tmp_path / "part.onnx", spec)
    reference = results(TorchBackend({part: module}), NOWHERE, spec)
    for found, expected in zip(engine, reference, strict=True):
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_results_land_in_the_bound_memory_and_inputs_are_read_from_it() -> None:
    backend = TorchBackend({"part": Scale()})
    x, y = (backend.allocate((2, WIDTH), DType.FLOAT32) for _ in range(2))
    memory = y.array
    session = backend.open(Artefact(path=NOWHERE), part_spec())
    launch = session.bind({"x": x, "y": y})
    for value in (1, 3):
        x.write(np.full((2, WIDTH), value, np.float32))
        launch.run()
        np.testing.assert_array_equal(memory, np.full((2, WIDTH), 2 * value, np.float32))
    assert session.launches == 2


def test_a_part_without_a_module_lists_those_there_are() -> None:
    backend = TorchBackend({"embed": Scale(), "head": Scale()})
    for use in (
        lambda: backend.open(Artefact(path=NOWHERE), part_spec()),
        lambda: backend.build(NOWHERE, part_spec(), NOWHERE),
    ):
        with pytest.raises(EngineError, match=r"no PyTorch module for part part\. There are: embed, head"):
            use()


def test_a_failing_module_and_one_of_other_outputs_are_engine_errors() -> None:
    class Failing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("shapes cannot be multiplied")

    class Wide(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x], dim=1)

    for module, message in ((Failing(), "part: .*cannot be multiplied"), (Wide(), r"part: .*returned \[\(\(1, 8\)")):
        backend = TorchBackend({"part": module})
        buffers = {name: HostBuffer.allocate((1, WIDTH), DType.FLOAT32) for name in "xy"}
        session = backend.open(Artefact(path=NOWHERE), part_spec())
        with pytest.raises(EngineError, match=message):
            session.bind(buffers).run()
        assert session.launches == 0


def test_a_buffer_that_does_not_fit_and_a_closed_session_are_engine_errors() -> None:
    backend = TorchBackend({"part": Scale()})
    spec = part_spec(inputs=(tensor("x", "rows", WIDTH),))
    session = backend.open(Artefact(path=NOWHERE), spec)
    buffers = {name: HostBuffer.allocate((1, WIDTH), DType.FLOAT32) for name in "xy"}
    with pytest.raises(EngineError, match="tensor y"):
        session.bind(buffers | {"y": HostBuffer.allocate((1, 9), DType.FLOAT32)})
    launch = session.bind(buffers)
    session.close()
    with pytest.raises(EngineError, match="closed"):
        launch.run()

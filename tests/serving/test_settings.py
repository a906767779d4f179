"""A server's settings: how many requests it serves side by side, and with how many threads each."""

from __future__ import annotations

import os

import pytest
from pydantic import ValidationError

from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
from adacorr_deploy.serving.settings import Limits
from adacorr_deploy.serving.triton_model import backend_for_lanes


def test_a_cpu_has_a_lane_for_each_core_and_a_gpu_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    assert Limits().lanes_on("onnxruntime") == 3
    assert Limits(lanes=2).lanes_on("onnxruntime") == 2
    assert [Limits(lanes=2).lanes_on(name) for name in ("tensorrt-rtx", "onnxruntime-cuda", None)] == [1, 1, 1]


def test_lanes_share_the_cores_and_one_lane_has_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    shares = {}
    for lanes in (2, 3, 16):
        backend = backend_for_lanes("onnxruntime", lanes)
        assert isinstance(backend, OnnxRuntimeBackend)
        shares[lanes] = backend.threads
    assert shares == {2: 4, 3: 2, 16: 1}
    assert backend_for_lanes("onnxruntime", 1) == "onnxruntime"
    assert backend_for_lanes("tensorrt", 4) == "tensorrt"


@pytest.mark.parametrize("lanes", [0, 257])
def test_lanes_beyond_any_machine_are_refused(lanes: int) -> None:
    with pytest.raises(ValidationError, match="lanes"):
        Limits(lanes=lanes)

"""What a workspace is said to take is what it allocates."""

from __future__ import annotations

import pytest

from adacorr_deploy.runtime.buffers import RunSize
from adacorr_deploy.runtime.workspace import allocate_workspace, workspace_bytes
from tests.models import model_spec
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_dit import UNITS, TinyDiT


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("steps", [4, 1000])
@pytest.mark.parametrize(("history", "output_history"), [(0, 0), (3, 0), (0, 2)])
def test_the_estimate_is_within_a_tenth_of_what_is_allocated(
    branches: int, steps: int, history: int, output_history: int
) -> None:
    model = model_spec(latent_shape=(3, 8, 8), patch=(1, 2), width=16, units=UNITS)
    size = RunSize(batch=5, branches=branches, steps=steps, history=history, output_history=output_history)
    backend = FakeBackend.of(TinyDiT())
    space = allocate_workspace(backend, model, {}, size)
    with space.slots.lease(references=lambda block: int(bool(history or output_history))):
        allocated = sum(buffer.values.nbytes for buffer in backend.buffers)
    assert workspace_bytes(model, size) == pytest.approx(allocated, rel=0.1)

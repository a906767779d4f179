"""A real Triton server and the same bundle in this process: what the benchmarks of serving compare."""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray

from adacorr_deploy.caching.policy import policy_named
from adacorr_deploy.runtime import BatchingEngine, Outcome, Pipeline, SampleRequest
from adacorr_deploy.serving.local_server import installed_triton
from adacorr_deploy.serving.repository import RepositoryOptions, write_repository
from adacorr_deploy.serving.settings import CPU_BACKEND, Limits
from adacorr_deploy.serving.tensors import Field
from adacorr_deploy.serving.trial_server import RunningServer, inputs_of, running
from adacorr_deploy.serving.triton_model import backend_for_lanes

SERVER: Final = "Triton 2.51 on the CPU, gRPC on loopback"
MAX_QUEUE: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """A server, and the same bundle in this process."""

    server: RunningServer
    pipeline: Pipeline
    engine: BatchingEngine
    steps: int  # that the bundle is calibrated for
    lanes: int

    @property
    def classes(self) -> int:
        return self.pipeline.manifest.model.num_classes


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request, as it goes to both sides."""

    labels: tuple[int, ...]
    seed: int
    steps: int
    policy: str

    @property
    def fields(self) -> dict[str, Field]:
        return {"class_labels": list(self.labels), "seed": self.seed, "steps": self.steps, "policy": self.policy}


@contextmanager
def both_sides(bundle: Path, folder: Path, lanes: int | None) -> Iterator[Sides]:
    """Serve a bundle, and open it in this process too, with as many lanes and threads."""
    limits = Limits(max_queue=MAX_QUEUE, lanes=lanes)
    count = limits.lanes_on(CPU_BACKEND)
    repository = write_repository(bundle, folder / "models", RepositoryOptions(limits=limits, name="bench"))
    with (
        running(installed_triton(), repository, folder / "log") as server,
        Pipeline.open(bundle, backend=backend_for_lanes(CPU_BACKEND, count)) as pipeline,
        BatchingEngine(pipeline, lanes=count) as engine,
    ):
        steps = repository.settings.defaults.steps
        yield Sides(server=server, pipeline=pipeline, engine=engine, steps=steps, lanes=count)


def sampled(engine: BatchingEngine, asked: Asked) -> NDArray[np.float32]:
    """Sample in this process, and wait for it."""
    done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    request = SampleRequest(asked.labels, steps=asked.steps, seed=asked.seed)
    engine.submit(request, policy_named(asked.policy), on_done=done.put)
    outcome = done.get()
    if outcome.result is None:
        raise SystemExit(f"in process: {outcome.error}")
    return outcome.result.latents


def served(client: triton.InferenceServerClient, model: str, asked: Asked) -> NDArray[np.float32]:
    """Ask the server, and wait for it."""
    outputs = [triton.InferRequestedOutput("latents")]
    latents: NDArray[np.float32] = client.infer(model, inputs_of(asked.fields), outputs=outputs).as_numpy("latents")
    return latents


def fingerprint(latents: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(latents).tobytes()).hexdigest()

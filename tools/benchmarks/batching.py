"""Throughput and latency of requests under mixed policies: one at a time, in static batches, and continuously batched.

    python tools/benchmarks/batching.py BUNDLE --clients 16 --requests 48 --rounds 3

Every client sends its next request when it has its last result. The three ways serve the same requests, in turns within
a round, so that a machine that drifts or is shared bends them alike; ratios are of medians over rounds, and of the
processor seconds that each way took, which other programs disturb less. A static batch is formed of requests of one
policy that wait at the same time, and decides as one. Continuous results are compared, bit for bit, with those sampled
one at a time. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
from machine import cpu_model, say
from numpy.typing import NDArray

from adacorr_deploy.caching.policy import Policy, policy_named
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
from adacorr_deploy.runtime import BatchingEngine, Outcome, Pipeline, SampleRequest, sample_with_policy
from adacorr_deploy.runtime.request import NoiseStream

CLASSES: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    request: SampleRequest
    policy: Policy


@dataclass(slots=True)
class Load:
    """Closed-loop clients: who waits since when, and how long each waited."""

    works: Sequence[Work]
    clients: int
    waiting: deque[int] = field(default_factory=deque)
    latencies: dict[int, float] = field(default_factory=dict)
    latents: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    _sent: int = 0
    _since: dict[int, float] = field(default_factory=dict)

    def send(self) -> int | None:
        """Let a client send the next request, if there is one."""
        if self._sent == len(self.works):
            return None
        number, self._sent = self._sent, self._sent + 1
        self._since[number] = time.perf_counter()
        self.waiting.append(number)
        return number

    def finish(self, number: int, latents: NDArray[np.float32]) -> None:
        self.latencies[number] = time.perf_counter() - self._since[number]
        self.latents[number] = latents

    @property
    def finished(self) -> bool:
        return len(self.latencies) == len(self.works)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    seconds: float
    cpu_seconds: float
    latencies: dict[int, float]
    latents: dict[int, NDArray[np.float32]]
    notes: dict[str, float] = field(default_factory=dict)


def one_at_a_time(pipeline: Pipeline, load: Load) -> dict[str, float]:
    while load.waiting:
        number = load.waiting.popleft()
        work = load.works[number]
        load.finish(number, sample_with_policy(pipeline, work.request, work.policy).latents)
        load.send()
    return {}


def in_static_batches(pipeline: Pipeline, load: Load, *, images: int) -> dict[str, float]:
    """Sample the oldest request, with those of its policy that wait."""
    batches = 0
    while load.waiting:
        policy = load.works[load.waiting[0]].policy
        members = [number for number in load.waiting if load.works[number].policy is policy][:images]
        for number in members:
            load.waiting.remove(number)
        requests = [load.works[number].request for number in members]
        shape = pipeline.manifest.model.latent_shape
        drawn = np.concatenate([NoiseStream(request, shape).at(0) for request in requests])
        batch = replace(requests[0], labels=tuple(request.labels[0] for request in requests), latents=drawn)
        latents = sample_with_policy(pipeline, batch, policy).latents
        for image, number in enumerate(members):
            load.finish(number, latents[image : image + 1])
            load.send()
        batches += 1
    return {"images_per_batch": len(load.works) / batches}


def continuously(engine: BatchingEngine, load: Load) -> dict[str, float]:
    done = threading.Event()
    lock = threading.Lock()

    def submit(number: int) -> None:
        work = load.works[number]
        engine.submit(work.request, work.policy, on_done=lambda outcome: finish(number, outcome))

    def finish(number: int, outcome: Outcome) -> None:
        if outcome.result is None:
            raise SystemExit(f"error: request {number} failed: {outcome.error}")
        with lock:
            load.finish(number, outcome.result.latents)
            following = load.send()
        if following is not None:
            submit(following)
        if load.finished:
            done.set()

    with lock:
        first = [*load.waiting]
    for number in first:
        submit(number)
    done.wait()
    stats = engine.stats()
    return {"occupancy": stats.occupancy, "rows_per_launch": stats.rows_used / max(stats.launches, 1)}


def measured(serve: Callable[[Load], dict[str, float]], works: Sequence[Work], clients: int) -> Measured:
    load = Load(works, clients)
    cpu, started = time.process_time(), time.perf_counter()
    for _ in range(clients):
        load.send()
    notes = serve(load)
    return Measured(
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu,
        latencies=load.latencies,
        latents=load.latents,
        notes=notes,
    )


def measured_continuously(pipeline: Pipeline, works: Sequence[Work], args: argparse.Namespace) -> Measured:
    options = {"buckets": args.buckets} if args.buckets else {}
    rows, lanes = args.max_active_rows, args.lanes
    with BatchingEngine(pipeline, max_queue=args.clients, max_active_rows=rows, lanes=lanes, **options) as engine:
        return measured(lambda load: continuously(engine, load), works, args.clients)


def row(rounds: Sequence[Measured]) -> dict[str, float | dict[str, float]]:
    waited = np.asarray([latency for measure in rounds for latency in measure.latencies.values()])
    return {
        "requests_per_second": statistics.median(len(measure.latencies) / measure.seconds for measure in rounds),
        "cpu_seconds_per_request": statistics.median(m.cpu_seconds / len(m.latencies) for m in rounds),
        "latency_p50_seconds": float(np.percentile(waited, 50)),
        "latency_p95_seconds": float(np.percentile(waited, 95)),
        **rounds[-1].notes,
    }


def ratios(rounds: dict[str, list[Measured]], arm: str, base: str) -> dict[str, float]:
    """Return the medians over rounds of what `arm` does in relation to `base` in the same round; above 1 is better."""

    def median(value: Callable[[Measured], float]) -> float:
        return statistics.median(value(b) / value(a) for a, b in zip(rounds[arm], rounds[base], strict=True))

    return {
        "throughput": median(lambda measure: measure.seconds),
        "cpu": median(lambda measure: measure.cpu_seconds),
        "latency_p95": median(lambda measure: float(np.percentile([*measure.latencies.values()], 95))),
    }


def works_of(args: argparse.Namespace) -> list[Work]:
    policies = [policy_named(name) for name in args.policies.split(",")]
    order = np.random.default_rng(0).integers(0, len(policies), args.requests)
    return [
        Work(
            request=SampleRequest((index % CLASSES,), steps=args.steps, guidance=args.guidance, seed=index),
            policy=policies[choice],
        )
        for index, choice in enumerate(order)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48, help="per way and round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policies", default="none,robust,scheduled,fora")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--static-images", type=int, default=8, help="of a static batch (default: %(default)s)")
    parser.add_argument("--buckets", type=lambda text: tuple(map(int, text.split(","))), help="rows of a launch")
    parser.add_argument("--max-active-rows", type=int)
    parser.add_argument(
        "--lanes", type=int, default=1, help="of the continuous way, which share the cores (default: %(default)s)"
    )
    args = parser.parse_args()
    works = works_of(args)
    rounds: dict[str, list[Measured]] = {"one at a time": [], "static batches": [], "continuous": []}
    cores = len(os.sched_getaffinity(0))
    shared = OnnxRuntimeBackend(threads=0 if args.lanes == 1 else max(1, cores // args.lanes))
    with Pipeline.open(args.bundle) as pipeline, Pipeline.open(args.bundle, backend=shared) as serving_pipeline:
        for policy in {work.policy.name: work for work in works}.values():  # plans are solved once, engines warm up
            sample_with_policy(pipeline, policy.request, policy.policy)
        serving: dict[str, Callable[[], Measured]] = {
            "one at a time": lambda: measured(lambda load: one_at_a_time(pipeline, load), works, args.clients),
            "static batches": lambda: measured(
                lambda load: in_static_batches(pipeline, load, images=args.static_images), works, args.clients
            ),
            "continuous": lambda: measured_continuously(serving_pipeline, works, args),
        }
        for turn in range(args.rounds):
            arms = [*serving][turn % 3 :] + [*serving][: turn % 3]
            for arm in arms:
                rounds[arm].append(serving[arm]())
                say(f"round {turn + 1} of {args.rounds}, {arm}: {rounds[arm][-1].seconds:.1f} s")
    alone, together = rounds["one at a time"][-1].latents, rounds["continuous"][-1].latents
    identical = all(np.array_equal(alone[number], together[number]) for number in alone)
    result = {
        "cpu": cpu_model(),
        "cores": cores,
        "load_average": os.getloadavg()[0],
        "lanes": args.lanes,
        "clients": args.clients,
        "requests": args.requests,
        "policies": args.policies,
        "identical_to_one_at_a_time": identical,
        **{arm: row(measures) for arm, measures in rounds.items()},
        "continuous_to_one_at_a_time": ratios(rounds, "continuous", "one at a time"),
        "continuous_to_static": ratios(rounds, "continuous", "static batches"),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

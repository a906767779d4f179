"""A real Triton server under load: what gRPC costs, what continuous batching gains, and whether hours of it stay sound.

    python tools/benchmarks/serving.py BUNDLE                    ratios, from one run
    python tools/benchmarks/serving.py BUNDLE --soak 100000      mixed requests, cancels, bad input, restarts of clients

Needs `bash tools/serving/install_triton.sh`. Ratios are of medians over rounds in which both sides take turns, so that
a machine that is shared bends them alike. A soak checks every answer by its hash against the same request in process,
and at the end that slots are free and the model's process has not grown. Prints one JSON object; exits with 1 if a soak
found a fault.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import tritonclient.grpc as triton
from machine import cpu_model, say
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from adacorr_deploy.caching.policy import policy_named
from adacorr_deploy.runtime import BatchingEngine, Outcome, Pipeline, SampleRequest
from adacorr_deploy.serving.local_server import installed_triton
from adacorr_deploy.serving.repository import RepositoryOptions, write_repository
from adacorr_deploy.serving.settings import CPU_BACKEND, Limits
from adacorr_deploy.serving.tensors import Field
from adacorr_deploy.serving.trial_server import RunningServer, inputs_of, refusal, running
from adacorr_deploy.serving.triton_model import backend_for_lanes

BATCH: Final = 8
POLICIES: Final = ("none", "robust@2", "scheduled@2", "fora@3", "robust@3", "fewer-steps@2")
POOL: Final = 60  # different requests of a soak
RESTART_EVERY: Final = 50  # requests of a client, after which it connects anew
WARM_UP: Final = 0.2  # share of a soak after which memory is to stay, and at least so many requests:
LEAST_WARM_UP: Final = 500
MOST_GROWTH: Final = 1.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """A server, and the same bundle in this process."""

    server: RunningServer
    engine: BatchingEngine
    classes: int
    steps: int  # that the bundle is calibrated for


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


# --- Both sides --------------------------------------------------------------------------------------------------


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


# --- Ratios ------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def overhead(sides: Sides, rounds: int) -> dict[str, float]:
    """Compare one request of eight images through gRPC with the same in process."""
    server, engine = sides.server, sides.engine
    labels = tuple(index % sides.classes for index in range(BATCH))
    asked = Asked(labels=labels, seed=1, steps=sides.steps, policy="none")
    with server.client() as client:
        for _ in range(2):
            same = np.array_equal(served(client, server.model, asked), sampled(engine, asked))
        through, inside = [], []
        for number in range(rounds):
            say(f"overhead, round {number + 1} of {rounds}")
            inside.append(timed(lambda: sampled(engine, asked)))
            through.append(timed(lambda: served(client, server.model, asked)))
    return {
        "gRPC ÷ in process, batch 8": statistics.median(through) / statistics.median(inside),
        "the same, fastest of each": min(through) / min(inside),
        "seconds in process": statistics.median(inside),
        "bit-identical": float(same),
    }


def throughput(sides: Sides, clients: int, requests: int, rounds: int) -> dict[str, float]:
    """Compare many clients at once with one request at a time, both through gRPC, policies mixed."""
    works = [
        Asked(labels=(index % sides.classes,), seed=index, steps=sides.steps, policy=POLICIES[index % len(POLICIES)])
        for index in range(requests)
    ]
    together, alone, waits = [], [], []
    for number in range(rounds):
        say(f"throughput, round {number + 1} of {rounds}")
        alone.append(run_clients(sides.server, works, 1)[0])
        seconds, latencies = run_clients(sides.server, works, clients)
        together.append(seconds)
        waits += latencies
    return {
        f"throughput, {clients} clients ÷ one at a time": statistics.median(alone) / statistics.median(together),
        f"requests per second, {clients} clients": requests / statistics.median(together),
        f"p95 seconds, {clients} clients": float(np.percentile(waits, 95)),
    }


def run_clients(server: RunningServer, works: Sequence[Asked], clients: int) -> tuple[float, list[float]]:
    """Let clients share the requests out, each sending its next when it has its last answer."""
    with ThreadPoolExecutor(clients) as pool, server.client() as client:
        started = time.perf_counter()
        latencies = list(pool.map(lambda asked: timed(lambda: served(client, server.model, asked)), works))
        return time.perf_counter() - started, latencies


# --- Soak --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Soak:
    """Clients with mixed wishes, and what came of them."""

    server: RunningServer
    pool: Sequence[tuple[Asked, str]]  # with the hash that each is to have
    total: int
    ended: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    resident: list[tuple[int, int]] = field(default_factory=list)  # requests done, bytes
    _next: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, clients: int) -> None:
        with ThreadPoolExecutor(clients) as pool:
            for done in [pool.submit(self._client, seed) for seed in range(clients)]:
                done.result()

    def _client(self, seed: int) -> None:
        wishes = random.Random(seed)  # noqa: S311  not for secrets
        client = self.server.client()
        sent = 0
        while self._take():
            sent += 1
            if sent % RESTART_EVERY == 0:
                client.close()
                client = self.server.client()
            ending, fault = self._ask(client, wishes)
            with self._lock:
                self.ended[ending] += 1
                if fault:
                    self.faults.append(fault)
        client.close()

    def _take(self) -> bool:
        with self._lock:
            if self._next >= self.total:
                return False
            self._next += 1
            number = self._next
        if number % max(1, self.total // 50) == 0:
            self.resident.append((number, resident_bytes(self.server.stub())))
            size = f"{self.resident[-1][1] / 1e6:.1f} MB"
            say(f"{number} of {self.total}: {dict(self.ended)}, {size}, {len(self.faults)} faults")
        return True

    def _ask(self, client: triton.InferenceServerClient, wishes: random.Random) -> tuple[str, str | None]:
        """Send one request, and return how it ended, and what is wrong with that."""
        asked, expected = wishes.choice(self.pool)
        kind = wishes.choices(("plain", "bad", "late", "leaves"), (80, 8, 6, 6))[0]
        fields = dict(asked.fields)
        if kind == "bad":
            fields.update(wishes.choice(BAD))
        if kind == "late":
            fields["timeout_ms"] = wishes.randint(1, 30)
        try:
            result = client.infer(
                self.server.model,
                inputs_of(fields),
                outputs=[triton.InferRequestedOutput("latents")],
                client_timeout=wishes.uniform(0.001, 0.05) if kind == "leaves" else None,
            )
        except InferenceServerException as error:
            code, text = refusal(error)
            fine = code in ALLOWED[kind]
            return f"{kind}: {code}", None if fine else f"{kind} {fields}: {code} {text}"
        if kind == "bad":
            return "bad: answered", f"{fields} was answered"
        fine = fingerprint(result.as_numpy("latents")) == expected
        return f"{kind}: answered", None if fine else f"{fields} came to another result"


BAD: Final[Sequence[dict[str, Field]]] = (
    {"class_labels": [100_000]},
    {"class_labels": [-1]},
    {"steps": 0},
    {"steps": 100_000},
    {"policy": "../../etc/passwd"},
    {"guidance": 0.0},
    {"sampler": "none"},
    {"outputs": ["jpeg"]},
)
ALLOWED: Final = {
    "plain": frozenset[str](),
    "bad": {"INVALID_ARGUMENT"},
    "late": {"CANCELLED"},
    "leaves": {"DEADLINE_EXCEEDED", "CANCELLED"},
}


def soak(sides: Sides, *, total: int, clients: int) -> dict[str, object]:
    """Send many mixed requests, and say what was wrong."""
    wishes = random.Random(0)  # noqa: S311  not for secrets
    asked = [
        Asked(
            labels=tuple(wishes.randrange(sides.classes) for _ in range(wishes.choice((1, 1, 1, 2, 3)))),
            seed=wishes.randrange(2**64),
            steps=wishes.choice((3, 4, 6)) if policy in ("none", "fora@3", "fewer-steps@2") else sides.steps,
            policy=policy,
        )
        for policy in (POLICIES[index % len(POLICIES)] for index in range(POOL))
    ]
    run = Soak(
        server=sides.server,
        pool=[(each, fingerprint(sampled(sides.engine, each))) for each in asked],
        total=total,
    )
    started = time.perf_counter()
    run.run(clients)
    seconds = time.perf_counter() - started
    status = settled(sides.server)
    if status["slot_bytes"] or status["active_requests"] or status["queue_depth"]:
        run.faults.append(f"left behind: {status}")
    warm = [size for number, size in run.resident if number >= min(max(WARM_UP * total, LEAST_WARM_UP), 0.9 * total)]
    growth = warm[-1] / warm[0]
    if growth > MOST_GROWTH:
        run.faults.append(f"resident memory grew to {growth:.3f} of what it was after warm-up")
    return {
        "requests": sum(run.ended.values()),
        "lost": total - sum(run.ended.values()),
        "seconds": round(seconds, 1),
        "ended": dict(sorted(run.ended.items())),
        "resident memory, end ÷ after warm-up": round(growth, 4),
        "faults": len(run.faults),
        "first faults": run.faults[:5],
    }


def settled(server: RunningServer) -> dict[str, object]:
    """Return the status once nothing runs any more, or after some seconds."""
    for _ in range(50):
        status = server.status()
        if not status["active_requests"] and not status["queue_depth"]:
            break
        time.sleep(0.1)
    return status


def resident_bytes(process_id: int) -> int:
    pages = int(Path(f"/proc/{process_id}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- The run -----------------------------------------------------------------------------------------------------


@contextmanager
def both_sides(bundle: Path, folder: Path, lanes: int | None) -> Iterator[Sides]:
    """Serve a bundle, and open it in this process too, with as many lanes and threads."""
    limits = Limits(max_queue=4096, lanes=lanes)
    count = limits.lanes_on(CPU_BACKEND)
    repository = write_repository(bundle, folder / "models", RepositoryOptions(limits=limits, name="bench"))
    with (
        running(installed_triton(), repository, folder / "log") as server,
        Pipeline.open(bundle, backend=backend_for_lanes(CPU_BACKEND, count)) as pipeline,
        BatchingEngine(pipeline, lanes=count) as engine,
    ):
        yield Sides(
            server=server,
            engine=engine,
            classes=pipeline.manifest.model.num_classes,
            steps=repository.settings.defaults.steps,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="calibrated for ddim and guidance 4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=48, help="of each round of the throughput")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--lanes", type=int, help="of both sides; default: one per core")
    parser.add_argument("--soak", type=int, metavar="N", help="send N mixed requests in place of measuring")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, both_sides(arguments.bundle, Path(folder), arguments.lanes) as sides:
        found: dict[str, object] = {"machine": cpu_model(), "server": "Triton 2.51 on the CPU, gRPC on loopback"}
        if arguments.soak:
            found.update(soak(sides, total=arguments.soak, clients=arguments.clients))
        else:
            found.update(overhead(sides, arguments.rounds))
            found.update(throughput(sides, arguments.clients, arguments.requests, arguments.rounds))
    print(json.dumps(found, indent=1, ensure_ascii=False))
    return 1 if found.get("faults") else 0


if __name__ == "__main__":
    sys.exit(main())

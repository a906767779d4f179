"""A real Triton server under load: what gRPC costs, and what continuous batching gains.

    python tools/benchmarks/serving.py BUNDLE

Needs `bash tools/serving/install_triton.sh`. Ratios are of medians over rounds in which both sides take turns, so that
a machine that is shared bends them alike. Prints one JSON object. Whether the server stays sound for long: `soak.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
from machine import cpu_model, say
from serving_sides import SERVER, Asked, Sides, both_sides, sampled, served
from static_front import StaticFront

BATCH: Final = 8
POLICIES: Final = ("none", "robust@2", "scheduled@2", "fora@3", "robust@3", "fewer-steps@2")


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
    """Compare many clients with one request at a time and with static batches, all through gRPC, policies mixed.

    A static batch goes to the same server as one request of up to eight images, as many batches at a time as the
    server has lanes.
    """
    works = [
        Asked(labels=(index % sides.classes,), seed=index, steps=sides.steps, policy=POLICIES[index % len(POLICIES)])
        for index in range(requests)
    ]
    seconds: dict[str, list[float]] = {"alone": [], "static": [], "together": []}
    waits: dict[str, list[float]] = {"alone": [], "static": [], "together": []}
    for number in range(rounds):
        say(f"throughput, round {number + 1} of {rounds}")
        with sides.server.client() as client, StaticFront(sides, images=BATCH) as front:
            arms: dict[str, tuple[int, Callable[[Asked], object]]] = {
                "alone": (1, lambda asked: served(client, sides.server.model, asked)),
                "static": (clients, front.ask),
                "together": (clients, lambda asked: served(client, sides.server.model, asked)),
            }
            for arm, (count, ask) in arms.items():
                took, latencies = run_clients(ask, works, count)
                seconds[arm].append(took)
                waits[arm] += latencies
    median = {arm: statistics.median(took) for arm, took in seconds.items()}
    p95 = {arm: float(np.percentile(latencies, 95)) for arm, latencies in waits.items()}
    return {
        f"throughput, {clients} clients ÷ one at a time": median["alone"] / median["together"],
        f"throughput, {clients} clients ÷ static batches": median["static"] / median["together"],
        f"p95, static batches ÷ {clients} clients": p95["static"] / p95["together"],
        f"requests per second, {clients} clients": requests / median["together"],
        f"p95 seconds, {clients} clients": p95["together"],
    }


def run_clients(ask: Callable[[Asked], object], works: Sequence[Asked], clients: int) -> tuple[float, list[float]]:
    """Let clients share the requests out, each sending its next when it has its last answer."""
    with ThreadPoolExecutor(clients) as pool:
        started = time.perf_counter()
        latencies = list(pool.map(lambda asked: timed(lambda: ask(asked)), works))
        return time.perf_counter() - started, latencies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="calibrated for ddim and guidance 4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=48, help="of each round of the throughput")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--lanes", type=int, help="of both sides; default: one per core")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, both_sides(arguments.bundle, Path(folder), arguments.lanes) as sides:
        found: dict[str, object] = {"machine": cpu_model(), "server": SERVER}
        found.update(overhead(sides, arguments.rounds))
        found.update(throughput(sides, arguments.clients, arguments.requests, arguments.rounds))
    print(json.dumps(found, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())

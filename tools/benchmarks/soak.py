"""Many mixed requests against a real Triton server: none lost, none wrong, nothing left behind, memory flat.

    python tools/benchmarks/soak.py --requests 100000        a tiny random model: the server is what is tried
    python tools/benchmarks/soak.py BUNDLE --requests 4000   a bundle of grey or RGB pixels, calibrated for ddim

Needs `bash tools/serving/install_triton.sh`. Policies, steps, streams, HTTP, deadlines, cancels, clients that hang up
or are killed, bad and hostile requests are mixed (`soak_requests.py`); clients connect anew now and then. Every answer
is compared by its hash with the same request in process. At the end what clients saw is held against the server's log,
request by request, and against its metrics; slots must be free; the three processes must not have grown since the
warm-up; then the model's process is killed, and that must be noticed by asking. Request N is the same in every run:
what Ctrl-C cuts off is summed up, and `--first N` goes on from there. Prints one JSON object; exits with 1 if it found
a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from machine import cpu_model, say
from serving_sides import SERVER, Sides, both_sides
from soak_requests import KINDS, Client, Ending, Request, Wish, pool
from tiny_bundle import write_tiny_bundle
from tritonclient.utils import InferenceServerException

from adacorr_deploy.serving.metrics import Outcome
from adacorr_deploy.serving.tensors import Field
from adacorr_deploy.serving.trial_server import RunningServer, inputs_of

RECONNECT_EVERY: Final = 50  # requests of a client
WARM_UP: Final = 0.2  # share of a soak after which memory is to stay, and at least so many requests:
LEAST_WARM_UP: Final = 10_000  # until then buffers of every size have been needed, and memory has been cut up
MOST_GROWTH: Final = 1.02
LOOKS: Final = 100  # at the memory
KILLED_CLIENTS: Final = 20
SHOWN: Final = 10  # faults
Memory = Mapping[str, int]  # bytes by process


@dataclass(slots=True)
class Soak:
    """Clients with mixed wishes, and what came of them."""

    server: RunningServer
    wishes: Sequence[Wish]
    numbers: range
    endings: dict[str, Ending] = field(default_factory=dict)  # by request id
    faults: list[str] = field(default_factory=list)
    memory: list[tuple[int, Memory]] = field(default_factory=list)  # requests begun
    killed: int = 0
    processes: Mapping[str, int] = field(init=False)  # ids
    _ended: Counter[str] = field(default_factory=Counter)
    _begun: int = 0
    _started: float = field(default_factory=time.perf_counter)
    _stopped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        server = self.server
        streams = server.stub(f"{server.model}_stream")
        self.processes = {"server": server.process.pid, "model": server.stub(), "stream": streams}

    @property
    def ended(self) -> dict[str, int]:
        return dict(sorted(self._ended.items()))

    @property
    def begun(self) -> int:
        return self._begun

    def resident(self) -> Memory:
        """Return the resident bytes of Triton, the model and the streaming model."""
        return {name: resident_bytes(process) for name, process in self.processes.items()}

    def run(self, clients: int) -> None:
        """Let clients share the requests out; Ctrl-C lets them end those that they have begun."""
        with ThreadPoolExecutor(clients) as threads:
            working = [threads.submit(self._serve) for _ in range(clients)]
            try:
                for each in working:
                    each.result()
            except KeyboardInterrupt:
                self._stopped = True

    def _serve(self) -> None:
        client, sent = Client(self.server), 0
        while (number := self._take()) is not None:
            sent += 1
            if sent % RECONNECT_EVERY == 0:
                client.close()
                client = Client(self.server)
            self._ask(client, number)
        client.close()

    def _take(self) -> int | None:
        with self._lock:
            if self._stopped or self._begun == len(self.numbers):
                return None
            place = self._begun
            self._begun += 1
        if (place + 1) % max(1, len(self.numbers) // LOOKS) == 0:
            self._look(place + 1)
        if place % max(1, len(self.numbers) // KILLED_CLIENTS) == 0:
            kill_a_client(self.server)
            self.killed += 1
        return self.numbers[place]

    def _ask(self, client: Client, number: int) -> None:
        chance = random.Random(number)  # noqa: S311  not for secrets
        (kind,) = chance.choices([*KINDS], [*KINDS.values()])
        request = Request(client=client, id=f"soak-{number}", wish=chance.choice(self.wishes), chance=chance)
        try:
            ending = kind(request)
        except Exception as error:  # noqa: BLE001  a fault of the server, or of ours: shown, and the soak goes on
            outcomes = frozenset([None, *Outcome])
            fault = f"{request.id} {kind.__name__} {request.wish.asked}: {error!r}"
            ending = Ending(name=f"{kind.__name__}: {type(error).__name__}", outcomes=outcomes, fault=fault)
            client.http.close()
        with self._lock:
            self.endings[request.id] = ending
            self._ended[ending.name] += 1
            if ending.fault:
                self.faults.append(ending.fault)
                say(ending.fault)

    def _look(self, begun: int) -> None:
        self.memory.append((begun, self.resident()))
        sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in self.memory[-1][1].items())
        seconds = time.perf_counter() - self._started
        say(f"{begun} of {len(self.numbers)} after {seconds:.0f} s: {sizes}, {len(self.faults)} faults")


def kill_a_client(server: RunningServer) -> None:
    """Let a process of its own ask for much, and kill it meanwhile."""
    script = (
        "import sys, tritonclient.grpc as triton\n"
        "from adacorr_deploy.serving.trial_server import inputs_of\n"
        f"client = triton.InferenceServerClient({server.grpc_address!r})\n"
        "fields = {'class_labels': [0, 1], 'steps': 900, 'policy': 'none'}\n"
        f"client.async_infer({server.model!r}, inputs_of(fields), request_id='killed',\n"
        "                   callback=lambda result, error: None)\n"
        "print('sent', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        if client.stdout is not None:
            client.stdout.readline()
        time.sleep(0.05)
        client.kill()


# --- After it ----------------------------------------------------------------------------------------------------


def reconciled(soak: Soak, lines: Sequence[Mapping[str, object]], metrics: Mapping[str, float]) -> list[str]:
    """Hold what clients saw against what the server says, and return what doesn't fit."""
    requests = [line for line in lines if line["event"] == "request"]
    said: dict[str, list[str]] = {}
    for line in requests:
        said.setdefault(str(line["request_id"]), []).append(str(line["outcome"]))
    faults = []
    for name, ending in soak.endings.items():
        outcomes = said.pop(name, [])
        if not ending.anonymous and not _fits(ending, outcomes):
            faults.append(f"{name} {ending.name}: the server's log says {outcomes or 'nothing'}")
    if set(killed := said.pop("killed", [])) - {Outcome.CANCELLED.value} or len(killed) > soak.killed:
        faults.append(f"{soak.killed} clients were killed, the log says {Counter(killed)}")
    anonymous = Counter(next(iter(each.outcomes)) for each in soak.endings.values() if each.anonymous)
    del anonymous[None]
    others = Counter(Outcome(outcome) for outcomes in said.values() for outcome in outcomes)
    if others != anonymous:
        faults.append(f"of requests without an id the log says {others}, clients saw {anonymous}")
    logged = Counter(str(line["outcome"]) for line in requests)
    counted = {each.value: int(metrics[f'adacorr_requests_total{{outcome="{each.value}"}}']) for each in Outcome}
    if counted != {each.value: logged[each.value] for each in Outcome}:
        faults.append(f"metrics count {counted}, the log says {dict(logged)}")
    if bugs := [line for line in lines if line["event"] == "bug"]:
        faults.append(f"the log tells of {len(bugs)} bugs, first: {bugs[0]}")
    return faults


def _fits(ending: Ending, outcomes: Sequence[str]) -> bool:
    if not outcomes:
        return None in ending.outcomes
    return len(outcomes) == 1 and Outcome(outcomes[0]) in ending.outcomes


def growth(looks: Sequence[tuple[int, Memory]], total: int) -> dict[str, float]:
    """Return each process's memory at the end over that after the warm-up, medians of ten looks each.

    Single looks at Triton's own process differ by some percent from one to the next.
    """
    warm_up = min(max(WARM_UP * total, LEAST_WARM_UP), 0.9 * total)
    warm = [sizes for begun, sizes in looks if begun >= warm_up] or [looks[-1][1]]
    return {
        name: round(median(each[name] for each in warm[-10:]) / median(each[name] for each in warm[:10]), 4)
        for name in warm[0]
    }


def resident_bytes(process_id: int) -> int:
    pages = int(Path(f"/proc/{process_id}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def settled(server: RunningServer) -> dict[str, object]:
    """Return the status once nothing runs any more, or after some seconds."""
    until = time.monotonic() + 30
    status = server.status()
    while time.monotonic() < until and any(status[name] for name in ("active_requests", "queue_depth", "streams")):
        time.sleep(0.2)
        status = server.status()
    time.sleep(1.5)  # after which the metrics are up to date
    return status


def death_is_noticed(server: RunningServer) -> list[str]:
    """Kill the model's process under requests, and return what is wrong with how that is seen from outside."""
    with server.client() as client:
        answers: deque[object] = deque()
        fields: dict[str, Field] = {"class_labels": [0], "steps": 900, "policy": "none"}
        for _ in range(4):
            client.async_infer(server.model, inputs_of(fields), callback=lambda result, error: answers.append(error))
        time.sleep(0.1)
        os.kill(server.stub(), signal.SIGKILL)
        until = time.monotonic() + 30
        while len(answers) < 4 and time.monotonic() < until:
            time.sleep(0.05)
    faults = [] if len(answers) == 4 else [f"{4 - len(answers)} requests wait for ever after the model's death"]
    with suppress(InferenceServerException):
        server.infer({"command": "status"}, "event", client_timeout=5.0)
        faults.append("the status is answered after the model's death")
    server.process.kill()  # it would wait half a minute for the dead model
    return faults


# --- The run -----------------------------------------------------------------------------------------------------


def soaked(sides: Sides, numbers: range, clients: int) -> dict[str, object]:
    """Send the requests, and say what was wrong."""
    soak = Soak(server=sides.server, wishes=pool(sides), numbers=numbers)
    with ThreadPoolExecutor(2 * sides.lanes) as threads:  # each lane keeps a workspace of the most steps from here on
        soak.killed += len([*threads.map(kill_a_client, [sides.server] * 2 * sides.lanes)])
    started = time.perf_counter()
    soak.run(clients)
    seconds = time.perf_counter() - started
    status = settled(sides.server)
    faults = [*soak.faults, *reconciled(soak, sides.server.log_lines(), sides.server.metrics())]
    if any(value for name, value in status.items() if name != "type"):
        faults.append(f"left behind: {status}")
    grown = growth([*soak.memory, (soak.begun, soak.resident())], soak.begun)
    faults += [f"{name} grew to {size} of what it was" for name, size in grown.items() if size > MOST_GROWTH]
    faults += death_is_noticed(sides.server)
    return {
        "requests": len(soak.endings),
        "lost": soak.begun - len(soak.endings),
        "next": numbers.start + soak.begun,
        "seconds": round(seconds, 1),
        "clients killed": soak.killed,
        "ended": soak.ended,
        "resident memory, end ÷ after warm-up": grown,
        "faults": len(faults),
        "first faults": faults[:SHOWN],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="default: a tiny random one, made for this")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first request")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--lanes", type=int, help="of both sides; default: one per core")
    parser.add_argument("--log", type=Path, help="file that the server's log is copied to at the end")
    arguments = parser.parse_args()
    numbers = range(arguments.first, arguments.first + arguments.requests)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = arguments.bundle or write_tiny_bundle(folder / "tiny.bundle")
        with both_sides(bundle, folder, arguments.lanes) as sides:
            try:
                found = {"machine": cpu_model(), "server": SERVER, **soaked(sides, numbers, arguments.clients)}
            finally:
                if arguments.log:
                    shutil.copyfile(sides.server.log, arguments.log)
    print(json.dumps(found, indent=1, ensure_ascii=False))
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())

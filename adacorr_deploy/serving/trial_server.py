"""A real Triton server around a repository, for as long as a test or a benchmark needs it, and the ways to ask it."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.serving.local_server import InstalledTriton, Ports
from adacorr_deploy.serving.repository import Repository
from adacorr_deploy.serving.tensors import INPUTS, Field

START_SECONDS: Final = 150.0  # a busy machine takes minutes to load NumPy and an engine
_STOP_SECONDS: Final = 60.0
_SHOWN: Final = 4000  # characters of a log
_DTYPES: Final[dict[str, type[np.generic]]] = {
    "STRING": np.object_,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "FP64": np.float64,
    "FP32": np.float32,
}
_FIELDS: Final = {field.name: field for field in INPUTS}


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    process: subprocess.Popen[bytes]
    ports: Ports
    log: Path
    model: str

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.ports.grpc}"

    def client(self) -> triton.InferenceServerClient:
        return triton.InferenceServerClient(self.grpc_address)

    def infer(
        self,
        fields: Mapping[str, Field],
        *outputs: str,
        client_timeout: float | None = None,
        request_id: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> triton.InferResult:
        with self.client() as client:
            return client.infer(
                self.model,
                inputs_of(fields),
                outputs=[triton.InferRequestedOutput(name) for name in outputs] or None,
                client_timeout=client_timeout,
                request_id=request_id,
                headers=headers,
            )

    def latents(self, fields: Mapping[str, Field]) -> NDArray[np.float32]:
        latents: NDArray[np.float32] = self.infer(fields, "latents").as_numpy("latents")
        return latents

    def post(self, path: str, body: Mapping[str, object]) -> tuple[int, bytes]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports.http}/v2/models/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310  of this machine
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports.http}/v2/health/ready", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def metrics(self) -> dict[str, float]:
        """Return what /metrics shows of ours, by series."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports.metrics}/metrics", timeout=5) as response:
            text = response.read().decode()
        return {name: float(value) for name, value in re.findall(r"^(adacorr_\S+) (\S+)$", text, re.MULTILINE)}

    def status(self) -> dict[str, object]:
        values: dict[str, object] = json.loads(self.infer({"command": "status"}, "event").as_numpy("event")[0])
        return values

    def log_lines(self) -> list[dict[str, object]]:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def stub(self, model: str | None = None) -> int:
        """Return the process id of a model's own process, by default of the one that samples."""
        name = model or self.model
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
                if any(word.endswith(f"/{name}/1/model.py".encode()) for word in words):
                    return int(child)
        raise EngineError(f"Model {name} has no process of its own.")


def inputs_of(fields: Mapping[str, Field]) -> list[triton.InferInput]:
    inputs = []
    for name, value in fields.items():
        field = _FIELDS[name]
        tensor = np.asarray(_coded(value), dtype=_DTYPES[field.datatype])
        if tensor.ndim == 0:
            tensor = tensor.reshape(1)
        inputs.append(triton.InferInput(name, tensor.shape, field.datatype.replace("STRING", "BYTES")))
        inputs[-1].set_data_from_numpy(tensor)
    return inputs


def _coded(value: Field) -> Field | bytes | list[bytes]:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list):
        return [item.encode() if isinstance(item, str) else item for item in value]  # type: ignore[return-value]
    return value


def refusal(error: InferenceServerException) -> tuple[str, str]:
    """Return the gRPC code and the text of what the server answered with."""
    return str(error.status()).removeprefix("StatusCode."), str(error.message())


@contextmanager
def running(
    triton_server: InstalledTriton, repository: Repository, log: Path, extra: Sequence[str] = ()
) -> Iterator[RunningServer]:
    """Serve a repository until the end of the block."""
    ports = Ports(http=_free_port(), grpc=_free_port(), metrics=_free_port())
    with log.open("wb") as output:
        process = subprocess.Popen(
            triton_server.command(repository.path, ports, *extra),
            env=triton_server.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        server = RunningServer(process=process, ports=ports, log=log, model=repository.model)
        try:
            _wait_until_ready(server)
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _wait_until_ready(server: RunningServer) -> None:
    until = time.monotonic() + START_SECONDS
    while not server.is_ready():
        if server.process.poll() is not None or time.monotonic() > until:
            end = server.log.read_text(encoding="utf-8", errors="replace")[-_SHOWN:]
            raise EngineError(f"The server did not come up within {START_SECONDS:g} s. The end of its log: {end}")
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

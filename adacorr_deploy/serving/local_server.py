"""A Triton server on this machine's CPU: where it is installed, and how it is started."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from adacorr_deploy.core.errors import BackendUnavailableError, EngineError

TRITON_VERSION: Final = "2.51.0"
FOLDER_VARIABLE: Final = "ADACORR_TRITON"
FORWARDED_HEADERS: Final = "(?i)traceparent"  # to the model, as parameters: what a client's trace is called
_EXIT_TIMEOUT_SECONDS: Final = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    http: int
    grpc: int
    metrics: int

    @classmethod
    def from_first(cls, first: int) -> Ports:
        """Return Triton's own order: HTTP, gRPC, metrics, one after another."""
        return cls(http=first, grpc=first + 1, metrics=first + 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledTriton:
    """A server that can be started."""

    binary: Path
    backends: Path | None = None  # folder of backends; None for the server's own
    python: Path | None = None  # of the environment that models run in; None for the machine's
    library_folder: Path | None = None  # of that Python's shared library

    def command(self, repository: Path, ports: Ports, *extra: str) -> list[str]:
        """Return what serves a repository on the loopback interface, with the configurations for CPUs."""
        backends = [f"--backend-directory={self.backends}"] if self.backends else []
        return [
            str(self.binary),
            f"--model-repository={repository}",
            "--model-config-name=cpu",
            *backends,
            "--disable-auto-complete-config",
            *(f"--{service}-address=127.0.0.1" for service in ("http", "grpc", "metrics")),
            f"--http-port={ports.http}",
            f"--grpc-port={ports.grpc}",
            f"--metrics-port={ports.metrics}",
            "--allow-gpu-metrics=false",
            f"--exit-timeout-secs={_EXIT_TIMEOUT_SECONDS}",
            *(f"--{service}-header-forward-pattern={FORWARDED_HEADERS}" for service in ("http", "grpc")),
            *extra,
        ]

    def environment(self) -> dict[str, str]:
        """Return the variables that it needs: its models take Python and its library from them."""
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        if self.python is not None:
            variables["PATH"] = f"{self.python.parent}{os.pathsep}{variables.get('PATH', '')}"
        if self.library_folder is not None:
            variables["LD_LIBRARY_PATH"] = str(self.library_folder)
        return variables


def install_folder() -> Path:
    """Return where tools/serving/install_triton.sh puts a server."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "adacorr-deploy" / f"triton-{TRITON_VERSION}"


def installed_triton() -> InstalledTriton:
    """Find a server: what the install script made, or one on PATH.

    Raises:
        BackendUnavailableError: If there is none.
    """
    folder = install_folder()
    if (folder / "installed").is_file():
        return InstalledTriton(
            binary=folder / "tritonserver",
            backends=folder / "backends",
            python=folder / "env" / "bin" / "python",
            library_folder=Path((folder / "library-folder").read_text(encoding="utf-8").strip()),
        )
    if found := shutil.which("tritonserver"):
        return InstalledTriton(binary=Path(found))
    raise BackendUnavailableError(
        f"No tritonserver is on PATH or in {folder}. Install one with tools/serving/install_triton.sh from a clone, or "
        "use Docker: the repository has a Dockerfile."
    )


def run_server(triton: InstalledTriton, repository: Path, ports: Ports) -> int:
    """Serve until the server ends; SIGTERM and Ctrl-C drain it.

    Returns:
        0 if it was asked to end, else its own code.

    Raises:
        EngineError: If it ends by itself, which it does when the model can't be loaded.
    """
    process = subprocess.Popen(triton.command(repository, ports), env=triton.environment())
    try:
        code = process.wait()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    if code:
        raise EngineError(f"The server ended with code {code}. Its log above says why.")
    return code

"""Many mixed requests on a real server: none lost, none wrong, the server's word is the clients', memory flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REQUESTS = 1000


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thousands_of_mixed_requests_leave_nothing_behind(repository_root: Path) -> None:
    script = repository_root / "tools" / "benchmarks" / "soak.py"
    command = [sys.executable, str(script), "--requests", str(REQUESTS), "--clients", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["requests"], found["lost"], found["faults"]) == (REQUESTS, 0, 0)
    endings = {ending.partition(":")[0] for ending in found["ended"]}
    assert endings == {"plain", "http", "stream", "late", "leaves", "cancels", "grpc", "bad", "hostile", "nan"}

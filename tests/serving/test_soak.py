"""Many mixed requests on a real server: none lost, none wrong, slots free, memory flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adacorr_deploy.core.bundle import Bundle

REQUESTS = 1000


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thousands_of_mixed_requests_leave_nothing_behind(served_bundle: Bundle, repository_root: Path) -> None:
    script = repository_root / "tools" / "benchmarks" / "serving.py"
    command = [sys.executable, str(script), str(served_bundle.path), "--soak", str(REQUESTS), "--clients", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["requests"], found["lost"], found["faults"]) == (REQUESTS, 0, 0)
    endings = {ending.partition(":")[0] for ending in found["ended"]}
    assert endings == {"plain", "bad", "late", "leaves"}

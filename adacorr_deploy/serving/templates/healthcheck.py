"""Ends with 0 if the model answers, 1 if not. Triton's own health stays good after the model's process has died.

python healthcheck.py [HOST:PORT]        gRPC; localhost:8001 if not given
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

MODEL: Final[str] = json.loads((Path(__file__).parent / "adacorr-repository.json").read_text())["model"]
SECONDS: Final = 4.0


def main() -> int:
    """Ask for the status, which takes no place in the queue, and print it."""
    address = sys.argv[1] if len(sys.argv) > 1 else "localhost:8001"
    command = triton.InferInput("command", [1], "BYTES")
    command.set_data_from_numpy(np.array([b"status"], dtype=np.object_))
    outputs = [triton.InferRequestedOutput("event")]
    try:
        client = triton.InferenceServerClient(address)
        response = client.infer(MODEL, [command], outputs=outputs, client_timeout=SECONDS)
    except InferenceServerException as error:
        print(f"not alive: {error}")
        return 1
    print(response.as_numpy("event")[0].decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())

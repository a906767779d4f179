"""Asks the server for images.

pip install 'tritonclient[grpc]'
python client.py 0 3 7                              one image of each class, into the folder images
python client.py 0 3 7 --seed 7 --quality fast      other noise, fewer evaluations
python client.py 0 --stream                         with progress on the way
python client.py --prompt 'a red dog' --size 768 512    of models that take text, and any size
"""

from __future__ import annotations

import argparse
import json
import queue
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

MODEL: Final[str] = json.loads((Path(__file__).parent / "adacorr-repository.json").read_text())["model"]
FACTS: Final = ("rho", "launches", "steps", "seconds", "queue_seconds", "policy")
DATATYPES: Final = {
    "class_labels": ("INT64", np.int64),
    "prompts": ("BYTES", np.object_),
    "negative_prompts": ("BYTES", np.object_),
    "size": ("INT64", np.int64),
    "seed": ("UINT64", np.uint64),
    "steps": ("INT64", np.int64),
    "guidance": ("FP64", np.float64),
    "policy": ("BYTES", np.object_),
    "quality": ("BYTES", np.object_),
    "preview_every": ("INT64", np.int64),
}
Value = int | float | str | list[int] | list[str]


def inputs_of(fields: Mapping[str, Value]) -> list[triton.InferInput]:
    """Return a request's fields as the server takes them."""
    inputs = []
    for name, value in fields.items():
        datatype, dtype = DATATYPES[name]
        values = [
            each.encode() if isinstance(each, str) else each for each in (value if isinstance(value, list) else [value])
        ]
        tensor: NDArray[np.generic] = np.array(values, dtype=dtype)
        inputs.append(triton.InferInput(name, tensor.shape, datatype))
        inputs[-1].set_data_from_numpy(tensor)
    return inputs


def outputs_of(*names: str) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name) for name in names]


def sample(client: triton.InferenceServerClient, fields: Mapping[str, Value]) -> triton.InferResult:
    return client.infer(MODEL, inputs_of(fields), outputs=outputs_of("png", *FACTS))


def stream(client: triton.InferenceServerClient, fields: Mapping[str, Value]) -> triton.InferResult:
    """Print progress, and return the last message."""
    messages: queue.Queue[tuple[triton.InferResult, Exception | None]] = queue.Queue()
    client.start_stream(callback=lambda result, error: messages.put((result, error)))
    client.async_stream_infer(f"{MODEL}_stream", inputs_of(fields), outputs=outputs_of("event", "png", *FACTS))
    try:
        while True:
            result, error = messages.get()
            if error is not None:
                raise error
            event = json.loads(result.as_numpy("event")[0])
            if event["type"] == "result":
                return result
            print(f"step {event['step']} of {event['steps']}, rho {event['rho']:.2f}")
    finally:
        client.stop_stream()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("class_labels", type=int, nargs="*", metavar="LABEL", help="one image of each class")
    parser.add_argument(
        "--prompt", dest="prompts", action="append", metavar="TEXT", help="what an image shows; repeated"
    )
    parser.add_argument("--negative-prompt", dest="negative_prompts", action="append", metavar="TEXT")
    parser.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="pixels")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--policy", help="in place of a quality")
    parser.add_argument("--quality", choices=["exact", "balanced", "fast"])
    parser.add_argument("--stream", action="store_true", help="show progress")
    parser.add_argument("--output", type=Path, default=Path("images"))
    parser.add_argument("--server", default="localhost:8001", help="gRPC address")
    arguments = vars(parser.parse_args())
    server, output, streamed = (arguments.pop(name) for name in ("server", "output", "stream"))
    fields = {name: value for name, value in arguments.items() if value is not None and value != []}
    try:
        result = (stream if streamed else sample)(triton.InferenceServerClient(server), fields)
    except InferenceServerException as error:
        raise SystemExit(f"error: {server} says: {error.message()}") from error
    output.mkdir(parents=True, exist_ok=True)
    labels = [f"class{label}" for label in fields.get("class_labels", [])] or ["prompt"] * len(
        fields.get("prompts", [])
    )
    for index, (label, png) in enumerate(zip(labels, result.as_numpy("png"), strict=True)):
        frames = {f"{index:02d}_{label}.png": png}
        if not isinstance(png, bytes):  # of a clip: its frames' files
            (output / f"{index:02d}_{label}").mkdir(exist_ok=True)
            frames = {f"{index:02d}_{label}/frame_{frame:03d}.png": file for frame, file in enumerate(png)}
        for name, file in frames.items():
            (output / name).write_bytes(file)
    rho, launches, steps, seconds, waited, policy = (result.as_numpy(name)[0] for name in FACTS)
    print(
        f"{index + 1} images in {output}: policy {policy.decode()}, {steps} steps, rho {rho:.2f}, {launches} launches, "
        f"{seconds:.2f} s after {waited:.2f} s in the queue"
    )


if __name__ == "__main__":
    main()

"""Asks the server for images.

pip install 'tritonclient[grpc]'            and safetensors, for --embeddings
python client.py 0 3 7                              one image of each class, into the folder images
python client.py 0 3 7 --seed 7 --quality fast      other noise, fewer evaluations
python client.py 0 --stream                         with progress on the way
python client.py --prompt 'a red dog' --size 768 512    of models that take text, and any size
python client.py --embeddings FILE.safetensors    of those whose text encoder is elsewhere
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

ABOUT: Final[dict[str, str]] = json.loads((Path(__file__).parent / "adacorr-repository.json").read_text())
MODEL: Final = ABOUT["model"]
GIVEN: Final = ABOUT["gives"]  # png, or latents where nothing makes images of them
FACTS: Final = ("rho", "launches", "steps", "seconds", "queue_seconds", "policy")
DATATYPES: Final = {
    "class_labels": ("INT64", np.int64),
    "prompts": ("BYTES", np.object_),
    "negative_prompts": ("BYTES", np.object_),
    "prompt_embeddings": ("FP32", np.float32),
    "prompt_mask": ("INT64", np.int64),
    "negative_embeddings": ("FP32", np.float32),
    "negative_mask": ("INT64", np.int64),
    "size": ("INT64", np.int64),
    "frames": ("INT64", np.int64),
    "frame_rate": ("FP64", np.float64),
    "seed": ("UINT64", np.uint64),
    "steps": ("INT64", np.int64),
    "guidance": ("FP64", np.float64),
    "policy": ("BYTES", np.object_),
    "quality": ("BYTES", np.object_),
    "preview_every": ("INT64", np.int64),
}
EMBEDDINGS: Final = ("prompt_embeddings", "prompt_mask", "negative_embeddings", "negative_mask")
Value = int | float | str | list[int] | list[str] | NDArray[np.generic]


def inputs_of(fields: Mapping[str, Value]) -> list[triton.InferInput]:
    """Return a request's fields as the server takes them."""
    inputs = []
    for name, value in fields.items():
        datatype, dtype = DATATYPES[name]
        values = value if isinstance(value, (list, np.ndarray)) else [value]
        coded = [each.encode() if isinstance(each, str) else each for each in values]
        tensor: NDArray[np.generic] = np.array(coded, dtype=dtype)
        inputs.append(triton.InferInput(name, tensor.shape, datatype))
        inputs[-1].set_data_from_numpy(tensor)
    return inputs


def embeddings_from(path: Path) -> dict[str, Value]:
    """Return what a text encoder made of prompts: a file's tensors, which have the names of a request's fields."""
    try:  # here alone, as other requests need no such package
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise SystemExit("error: --embeddings needs a package: pip install safetensors") from error
    try:
        tensors = load_file(path)
        if unknown := sorted(tensors.keys() - set(EMBEDDINGS)):
            raise ValueError(f"it holds {unknown[0]!r}, allowed are {', '.join(EMBEDDINGS)}")
        return {name: tensor.astype(DATATYPES[name][1], casting="same_kind") for name, tensor in tensors.items()}
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise SystemExit(f"error: {path} can't be read as embeddings: {error}") from error


def outputs_of(*names: str) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name) for name in names]


def sample(client: triton.InferenceServerClient, fields: Mapping[str, Value]) -> triton.InferResult:
    return client.infer(MODEL, inputs_of(fields), outputs=outputs_of(GIVEN, *FACTS))


def stream(client: triton.InferenceServerClient, fields: Mapping[str, Value]) -> triton.InferResult:
    """Print progress, and return the last message."""
    messages: queue.Queue[tuple[triton.InferResult, Exception | None]] = queue.Queue()
    client.start_stream(callback=lambda result, error: messages.put((result, error)))
    client.async_stream_infer(f"{MODEL}_stream", inputs_of(fields), outputs=outputs_of("event", GIVEN, *FACTS))
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


def write_pictures(output: Path, names: list[str], pictures: NDArray[np.object_]) -> None:
    """Write a PNG file for each image, and of each clip a folder with its frames."""
    for index, (name, png) in enumerate(zip(names, pictures, strict=True)):
        stem = f"{index:02d}_{name}"
        files = {f"{stem}.png": png}
        if not isinstance(png, bytes):  # of a clip: its frames' files
            (output / stem).mkdir(exist_ok=True)
            files = {f"{stem}/frame_{frame:03d}.png": file for frame, file in enumerate(png)}
        for file_name, file in files.items():
            (output / file_name).write_bytes(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("class_labels", type=int, nargs="*", metavar="LABEL", help="one image of each class")
    parser.add_argument(
        "--prompt", dest="prompts", action="append", metavar="TEXT", help="what an image shows; repeated"
    )
    parser.add_argument("--negative-prompt", dest="negative_prompts", action="append", metavar="TEXT")
    parser.add_argument("--embeddings", type=Path, metavar="FILE.safetensors", help="in place of prompts")
    parser.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="pixels")
    parser.add_argument("--frames", type=int, help="of a clip")
    parser.add_argument("--fps", dest="frame_rate", type=float, help="frames per second of a clip")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--policy", help="in place of a quality")
    parser.add_argument("--quality", choices=["exact", "balanced", "fast"])
    parser.add_argument("--stream", action="store_true", help="show progress")
    parser.add_argument("--output", type=Path, default=Path("images"))
    parser.add_argument("--server", default="localhost:8001", help="gRPC address")
    arguments = vars(parser.parse_args())
    server, output, streamed, embeddings = (
        arguments.pop(name) for name in ("server", "output", "stream", "embeddings")
    )
    fields = {name: value for name, value in arguments.items() if value is not None and value != []}
    fields |= embeddings_from(embeddings) if embeddings is not None else {}
    try:
        result = (stream if streamed else sample)(triton.InferenceServerClient(server), fields)
    except InferenceServerException as error:
        raise SystemExit(f"error: {server} says: {error.message()}") from error
    output.mkdir(parents=True, exist_ok=True)
    given = result.as_numpy(GIVEN)
    if GIVEN == "latents":
        np.save(output / "latents.npy", given)
    else:
        names = [f"class{label}" for label in fields.get("class_labels", [])] or ["prompt"] * len(given)
        write_pictures(output, names, given)
    rho, launches, steps, seconds, waited, policy = (result.as_numpy(name)[0] for name in FACTS)
    print(
        f"{len(given)} images in {output}: policy {policy.decode()}, {steps} steps, rho {rho:.2f}, "
        f"{launches} launches, {seconds:.2f} s after {waited:.2f} s in the queue"
    )


if __name__ == "__main__":
    main()

"""What a bench has finished, in a folder: an interrupted one goes on there, and a longer one starts from it.

    DIR/run.json                          what was run: another bundle or other options are refused
    DIR/NAME-HASH/images-00000.npz        latents, ρ and FLOPs of a policy's request
    DIR/NAME-HASH/trajectory.npz          decisions, latents and time of every step of its first request
    DIR/NAME-HASH/samples-00000.npz       features of a request for the comparison of sets
    DIR/rounds.json                       seconds of every finished round

Each file appears whole or not at all. Files are checked when they are read back, name by name, type, shape and numbers;
one that doesn't fit is made again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adacorr_deploy.caching.policy import Policy
from adacorr_deploy.core.bundle import replace_file
from adacorr_deploy.core.errors import OutputError
from adacorr_deploy.core.manifest import MANIFEST_NAME, file_record
from adacorr_deploy.core.untrusted import bounded_file, clipped
from adacorr_deploy.quality.array_files import arrays_from_npz, npz_from_arrays
from adacorr_deploy.quality.bench_options import BenchOptions, sampler_of_runs
from adacorr_deploy.runtime import Pipeline

_FORMAT: Final = 1
_RUN_NAME: Final = "run.json"
_ROUNDS_NAME: Final = "rounds.json"
_MAX_BYTES: Final = 1 << 30  # of a file that is read back
_MAX_JSON_BYTES: Final = 64 << 20

Arrays = Mapping[str, NDArray[np.generic]]
_T = TypeVar("_T", bound=BaseModel)


class RunKey(BaseModel):
    """What results must have in common to be compared; how many images, rounds and samples there are is no part."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: int = _FORMAT
    bundle_sha256: str  # of the manifest, which holds the hash of every file: calibrations too
    backend: str
    hardware: str
    sampler: str
    steps: int
    guidance: float
    seed: int
    batch: int
    features: str  # identity of the network; empty where there is none
    prompts: str | None = None  # SHA-256; None where the model takes none, or random ones were measured

    @classmethod
    def of(cls, pipeline: Pipeline, options: BenchOptions, features: str) -> RunKey:
        return cls(
            bundle_sha256=file_record(pipeline.bundle.path / MANIFEST_NAME).sha256,
            backend=pipeline.backend.name,
            hardware=pipeline.backend.hardware,
            sampler=sampler_of_runs(pipeline, options).value,
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed,
            batch=options.batch,
            features=features,
            prompts=pipeline.example_prompts_sha256,
        )


Seconds = Annotated[float, Field(gt=1e-9, lt=1e9)]  # whose ratios are numbers too


class Round(BaseModel):
    """One round: the time that each policy took for all images, one after the other."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    images: int
    seconds: dict[str, Seconds]  # by the policy's key


class _Rounds(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: list[Round]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """What an array that is read back must be; a None in the shape stands for any size."""

    dtype: str  # NumPy's kind and size, such as f4; U for text of any length
    shape: tuple[int | None, ...]
    finite: bool = True


class ResultStore:
    """Finished pieces of one bench; without a folder it keeps nothing and finds nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._rounds: list[Round] = []

    @classmethod
    def open(cls, folder: Path | None, key: RunKey) -> ResultStore:
        """Open a results folder, or begin one.

        Raises:
            OutputError: If it holds another run's results, or can't be written.
        """
        store = cls(folder)
        if folder is not None:
            found = _json_model(folder / _RUN_NAME, RunKey)
            if (found is not None and found != key) or (found is None and _holds_files(folder)):
                raise OutputError(f"{folder} holds {_difference(found, key)}. Choose another folder for the results.")
            _write(folder / _RUN_NAME, key.model_dump_json(indent=1).encode())
            rounds = _json_model(folder / _ROUNDS_NAME, _Rounds)
            store._rounds = rounds.rounds if rounds is not None else []
        return store

    def load(self, policy: Policy, name: str, specs: Mapping[str, ArraySpec]) -> Arrays | None:
        """Return the arrays of a finished piece, or None if there is none that fits."""
        if self._folder is None:
            return None
        try:
            content = bounded_file(self._path(policy, name), limit_bytes=_MAX_BYTES)
            return _checked_arrays(content, specs)
        except (OSError, ValueError):
            return None

    def save(self, policy: Policy, name: str, arrays: Arrays) -> None:
        """Keep a finished piece.

        Raises:
            OutputError: If it can't be written.
        """
        if self._folder is None:
            return
        _write(self._path(policy, name), npz_from_arrays(**arrays))

    def rounds(self, policies: Sequence[Policy], images: int) -> list[dict[str, float]]:
        """Return the finished rounds that timed all these policies, by policy name."""
        keys = {policy_key(policy): policy.name for policy in policies}
        return [
            {name: each.seconds[key] for key, name in keys.items()}
            for each in self._rounds
            if each.images == images and keys.keys() <= each.seconds.keys()
        ]

    def add_round(self, policies: Sequence[Policy], images: int, seconds: Mapping[str, float]) -> None:
        """Keep a finished round.

        Raises:
            OutputError: If it can't be written.
        """
        timed = {policy_key(policy): seconds[policy.name] for policy in policies if policy.name in seconds}
        self._rounds.append(Round(images=images, seconds=timed))
        if self._folder is not None:
            _write(self._folder / _ROUNDS_NAME, _Rounds(rounds=self._rounds).model_dump_json().encode())

    def _path(self, policy: Policy, name: str) -> Path:
        assert self._folder is not None
        return self._folder / policy_key(policy) / f"{name}.npz"


def policy_key(policy: Policy) -> str:
    """Return what tells a policy from any other, and can be a folder's name."""
    settings = json.dumps(policy.model_dump(mode="json", by_alias=True), sort_keys=True)
    word = re.sub(r"[^a-z0-9.@+-]+", "-", policy.name.lower()).strip("-.")[:40]
    return f"{word or 'policy'}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"


def _checked_arrays(content: bytes, specs: Mapping[str, ArraySpec]) -> Arrays:
    """Read an archive of arrays.

    Raises:
        ValueError: If it is none, or an array is missing or not what it must be.
    """
    arrays = arrays_from_npz(content, specs)
    for name, spec in specs.items():
        array = arrays[name]
        kind = array.dtype.kind if spec.dtype == "U" else array.dtype.str[1:]
        sizes = len(array.shape) == len(spec.shape) and all(
            wanted in (None, size) for wanted, size in zip(spec.shape, array.shape, strict=True)
        )
        if kind != spec.dtype or not sizes or (spec.finite and kind != "U" and not np.isfinite(array).all()):
            raise ValueError(f"{name} is {array.dtype} {array.shape}")
    return arrays


def _json_model(path: Path, model: type[_T]) -> _T | None:
    """Return a JSON file's content, or None if there is none that is valid."""
    try:
        return model.model_validate_json(bounded_file(path, limit_bytes=_MAX_JSON_BYTES))
    except (OSError, ValueError, ValidationError):
        return None


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _difference(found: RunKey | None, key: RunKey) -> str:
    if found is None:
        return "other files, and no results of a bench"
    old, new = found.model_dump(), key.model_dump()
    differing = [name for name in new if old[name] != new[name]]
    fields = ", ".join(f"{name} {clipped(old[name])}, not {clipped(new[name])}" for name in differing)
    return f"the results of another run ({fields})"


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise OutputError(
            f"{path} can't be written: {error.strerror}. Free some space, or choose another folder for the results."
        ) from error

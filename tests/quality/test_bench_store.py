"""What a results folder holds is checked before it is used or shown: anybody may have written it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adacorr_deploy.caching.policy import PRESETS
from adacorr_deploy.core.errors import OutputError
from adacorr_deploy.quality.array_files import npz_from_arrays
from adacorr_deploy.quality.bench_store import ArraySpec, ResultStore, RunKey, policy_key

KEY = RunKey(
    bundle_sha256="0" * 64,
    backend="onnxruntime",
    hardware="cpu",
    sampler="ddim",
    steps=50,
    guidance=4.0,
    seed=0,
    batch=8,
    features="",
)
POLICY = PRESETS["fora"]


def test_a_refusal_shows_no_more_than_a_few_printable_words_of_the_folder(tmp_path: Path) -> None:
    ResultStore.open(tmp_path, KEY)
    document = json.loads((tmp_path / "run.json").read_text())
    document["hardware"] = "\x1b[2J" + "x" * 100_000
    (tmp_path / "run.json").write_text(json.dumps(document))
    with pytest.raises(OutputError, match=r"the results of another run \(hardware .*, not 'cpu'\)") as refused:
        ResultStore.open(tmp_path, KEY)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("array", "fits"),
    [
        (np.zeros((2, 3), np.float32), True),
        (np.zeros((2, 4), np.float32), False),
        (np.zeros((2, 3)), False),
        (np.full((2, 3), np.nan, np.float32), False),
    ],
)
def test_a_piece_that_is_not_what_it_must_be_is_made_again(
    tmp_path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], fits: bool
) -> None:
    store = ResultStore.open(tmp_path, KEY)
    (tmp_path / policy_key(POLICY)).mkdir()
    (tmp_path / policy_key(POLICY) / "piece.npz").write_bytes(npz_from_arrays(a=array))
    found = store.load(POLICY, "piece", {"a": ArraySpec(dtype="f4", shape=(2, None) if fits else (2, 3))})
    assert (found is not None) == fits


def test_rounds_that_no_clock_measured_are_not_taken(tmp_path: Path) -> None:
    ResultStore.open(tmp_path, KEY).add_round([POLICY], 16, {POLICY.name: 2.0})
    assert ResultStore.open(tmp_path, KEY).rounds([POLICY], 16) == [{POLICY.name: 2.0}]
    text = (tmp_path / "rounds.json").read_text()
    for seconds in ("0.0", "-1.0", "1e300", "NaN"):
        (tmp_path / "rounds.json").write_text(text.replace("2.0", seconds))
        assert ResultStore.open(tmp_path, KEY).rounds([POLICY], 16) == []

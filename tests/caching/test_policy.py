"""A policy file either becomes a valid policy or is refused with the field's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adacorr_deploy.caching.policy import DEFAULT_POLICY, PRESETS, AdaCorrectionGate, policy_named
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.core.errors import PolicyError


def test_every_preset_survives_a_round_trip_through_a_file(tmp_path: Path) -> None:
    for name, policy in PRESETS.items():
        path = tmp_path / f"{name}.json"
        path.write_text(policy.model_dump_json(by_alias=True))
        assert policy_named(str(path)) == policy


def test_a_toml_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\n[gate]\nkind = "adacorrection"\nspeedup = 2.5\n[predictor]\nkind = "taylor"\norder = 2\n'
    )
    policy = policy_named(str(path))
    assert isinstance(policy.gate, AdaCorrectionGate)
    assert (policy.gate.speedup, policy.predictor.kind, policy.predictor.history) == (2.5, PredictorKind.TAYLOR, 3)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"name": "x", "gate": {"kind": "magic"}}, "gate"),
        ({"name": "x", "gate": {"kind": "interval", "interval": 0}}, "gate.interval.interval"),
        ({"name": "x", "gate": {"kind": "none"}, "speed": 2}, "speed"),
        ({"name": "x", "gate": {"kind": "none"}, "predictor": {"order": 3}}, "predictor.order"),
        ({"name": "x", "gate": {"kind": "adacorrection", "band": float("nan")}}, "gate.adacorrection.band"),
        ({"name": "x", "gate": {"kind": "none"}, "guards": {"warmup_steps": -1}}, "guards.warmup_steps"),
        ({"gate": {"kind": "none"}}, "name"),
        ([], "top level"),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, content: object, field: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PolicyError, match=field):
        policy_named(str(path))


@pytest.mark.parametrize("content", ["{", "\x00", "[1,"])
def test_a_file_that_is_not_json_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(PolicyError, match="can't be read"):
        policy_named(str(path))


def test_an_unknown_name_lists_the_presets() -> None:
    with pytest.raises(PolicyError, match="robust"):
        policy_named("robus")


def test_a_target_after_at_changes_the_gate() -> None:
    assert policy_named("robust@2.5").gate == AdaCorrectionGate(speedup=2.5)
    with pytest.raises(PolicyError, match="speedup"):
        policy_named("robust@0.5")
    with pytest.raises(PolicyError, match="no target"):
        policy_named("none@2")


def test_only_policies_that_read_a_calibration_ask_for_one() -> None:
    needing = {name for name, policy in PRESETS.items() if policy.needs_calibration}
    assert needing == {"scheduled", "scheduled-blocks", "robust", "robust-blocks", "paper-lazy"}
    assert DEFAULT_POLICY in PRESETS


def test_fewer_steps_is_the_only_policy_that_changes_the_sampler() -> None:
    assert PRESETS["fewer-steps"].sampled_steps(50) == 25
    assert all(policy.sampled_steps(50) == 50 for name, policy in PRESETS.items() if name != "fewer-steps")


def test_the_longest_history_is_three() -> None:
    assert max(Predictor(kind=kind, order=2).history for kind in PredictorKind) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": {"kind": "paper"}}, "can't blend blocks"),
        ({"gate": {"kind": "adacorrection", "corrector": "paper"}}, "can't blend blocks"),
        ({"guards": {"protected_blocks": [2]}}, "can't protect blocks"),
    ],
)
def test_a_predictor_of_whole_steps_is_refused_where_blocks_are_meant(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    content = {"name": "x", "gate": {"kind": "none"}, "predictor": {"kind": "output-taylor"}, **change}
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PolicyError, match=message):
        policy_named(str(path))


@pytest.mark.parametrize(
    ("steps", "speedup", "sampled"), [(50, 2, 25), (27, 2, 13), (50, 3, 16), (25, 1.5, 16), (1, 20, 1)]
)
def test_fewer_steps_takes_no_more_steps_than_a_schedule_of_the_same_target(
    steps: int, speedup: float, sampled: int
) -> None:
    assert policy_named(f"fewer-steps@{speedup}").sampled_steps(steps) == sampled


def test_a_lazy_paper_gate_with_another_lambda_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"name": "x", "gate": {"kind": "paper", "lazy": True, "lambda": 0.5}}))
    with pytest.raises(PolicyError, match="floor"):
        policy_named(str(path))


def test_an_at_sign_without_a_target_is_refused() -> None:
    with pytest.raises(PolicyError):
        policy_named("robust@")

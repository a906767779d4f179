"""A policy file either becomes a valid policy or is refused with the field's name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from adacorr_deploy.caching.decisions import Placement
from adacorr_deploy.caching.gates.adacorrection import Correction, PaperCorrection
from adacorr_deploy.caching.gates.codebook import MotionRegularisation
from adacorr_deploy.caching.gates.rule import GateSettings
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.policy import (
    DEFAULT_POLICY,
    FILE_PRESETS,
    ON_TOP,
    PAPERS,
    PRESETS,
    AdaCorrectionGate,
    Policy,
    policy_named,
    word_for_commands,
)
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.core.errors import PolicyError


def test_every_preset_survives_a_round_trip_through_a_file(tmp_path: Path) -> None:
    for name, policy in PRESETS.items():
        path = tmp_path / f"{name}.json"
        path.write_text(policy.model_dump_json(by_alias=True))
        assert policy_named(str(path)) == policy


METHOD = Path(__file__).parents[2] / "adacorr_deploy" / "docs" / "method.md"


def test_the_policy_files_of_the_documentation_load_and_every_field_is_in_it(tmp_path: Path) -> None:
    section = METHOD.read_text(encoding="utf-8").partition("## A policy file")[2].partition("\n## ")[0]
    loaded = []
    for kind, example in re.findall(r"```(toml|json)\n(.*?)```", section, re.DOTALL):
        path = tmp_path / f"example.{kind}"
        path.write_text(example, encoding="utf-8")
        loaded.append(policy_named(str(path)))
    assert [policy.name for policy in loaded] == ["mine", "every-fourth"]
    assert loaded[0].gate == AdaCorrectionGate()  # what it says of defaults is true
    assert loaded[0].predictor == Predictor()
    assert loaded[0].guards.model_copy(update={"protected_blocks": frozenset()}) == Guards()
    gates = [type(policy.gate) for policy in PRESETS.values()]
    for model in (Policy, Predictor, Guards, Correction, PaperCorrection, *gates):
        for name, field in model.model_fields.items():
            assert re.search(rf"(^|`|\[){field.alias or name}\b", section, re.MULTILINE), (model, name)
    assert all(f"`{gate.model_fields['kind'].default}`" in section for gate in gates)


def numbers_of(model: type[BaseModel]) -> Iterator[tuple[str, str, str]]:
    """Yield each field that is a number or a flag: its name, default and range, in the documentation's words."""
    for name, given in model.model_json_schema()["properties"].items():
        field = given.get("anyOf", [given])[0]
        if field.get("type") in {"integer", "number", "boolean"}:
            default = given["default"]
            shown = f"{default:g}" if isinstance(default, float) else str(default).lower()
            yield name, shown, range_of(field)


def range_of(field: Mapping[str, float]) -> str:
    match field:
        case {"minimum": low, "maximum": high}:
            return f"{low:g} … {high:g}"
        case {"exclusiveMinimum": low, "maximum": high}:
            return f"above {low:g}, to {high:g}"
        case {"minimum": low, "exclusiveMaximum": high}:
            return f"from {low:g} to below {high:g}"
        case {"exclusiveMinimum": low, "exclusiveMaximum": high}:
            return f"above {low:g} and below {high:g}"
        case _:
            return ""


def test_the_documentation_has_the_defaults_and_ranges_of_every_gate_and_guard() -> None:
    section = METHOD.read_text(encoding="utf-8").partition("## A policy file")[2].partition("\n## ")[0]
    rows: dict[str, str] = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            rows |= dict.fromkeys(re.findall(r"`([^`]+)`", line.split("|")[1]), line)
    gates = {type(policy.gate) for policy in PRESETS.values()} | {*FILE_PRESETS.values()}
    tabled: list[tuple[str, type[BaseModel]]] = [(gate.model_fields["kind"].default, gate) for gate in gates]
    tabled.append(("adacache", MotionRegularisation))
    for kind, model in tabled:
        for name, default, values in numbers_of(model) if model is not AdaCorrectionGate else ():
            words = f"`{name}` {default}" + (f", {values}" if values else "")
            assert re.search(rf"{re.escape(words)}(?![\d.])", rows[kind]), (kind, words)
    for model in (AdaCorrectionGate, Guards):
        for name, _, values in numbers_of(model):  # the defaults are compared where the example is loaded
            assert re.search(rf"^{name} = \S+ +# {re.escape(values)}(?![\d.])", section, re.MULTILINE), (name, values)


def test_the_documentations_table_is_that_of_the_presets() -> None:
    text = METHOD.read_text(encoding="utf-8").partition("## The table of policies")[2].partition("\n## ")[0]
    rows = [re.split(r" *(?<!\\)\| *", line.strip("| ")) for line in text.splitlines() if line.startswith("| `")]
    row_of = {name: row for row in rows for name in re.findall(r"`([^`]+)`", row[0])}
    named = {name.partition("@")[0] for name in row_of}
    assert named == {*PRESETS, *FILE_PRESETS, *(f"NAME+{word}" for word in ON_TOP)}
    assert all(f"{name}@FILE" in row_of for name in FILE_PRESETS)
    for name, policy in PRESETS.items():
        knob = f"@{getattr(policy.gate, policy.gate.knob):g}" if policy.gate.knob else ""
        names, _, _, spans, predictor, needs, paper = row_of[f"{name}{knob}"]
        assert not policy.caches or spans.startswith(policy.division.granularity.value), name
        assert not policy.caches or f"`{policy.predictor.kind.value}`" in predictor, name
        assert ("profile" in needs) == bool(policy.quantities), name
        assert not policy.needs_calibration or "calibration" in needs, name
        assert policy.needs_calibration or "calibration" not in needs or "paper-lazy" in names, name
        assert (policy.gate.paper or PAPERS.get(name, "")) in paper, name


def test_each_policy_that_was_published_cites_its_paper_in_its_gates_docstring() -> None:
    others: list[type[GateSettings]] = [*FILE_PRESETS.values(), Correction, PaperCorrection]
    papers: set[tuple[type[GateSettings], str]] = {(model, model.paper) for model in others}
    papers |= {(type(policy.gate), policy.gate.paper or PAPERS.get(name, "")) for name, policy in PRESETS.items()}
    cited = {(model, paper) for model, paper in papers if f"arXiv {paper}" in (model.__doc__ or "")}
    assert {model.__name__ for model, _ in papers - cited} == {
        "NoGate", "FewerStepsGate", "ScheduleGate", "MaskGate",  # no method of others, or none with a name
        "FirstBlocksGate", "PruneGate",  # published as code alone
    }  # fmt: skip


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
        ({"name": "x", "gate": {"kind": "adacorrection", "band": 1.0}}, "gate.adacorrection.band"),
        ({"name": "x", "gate": {"kind": "adacorrection", "band": float("nan")}}, "NaN is not a JSON number"),
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


@pytest.mark.parametrize("suffix", [".json", ".toml"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", ""),
        (b"\x00", ""),
        (b"[1,", ""),
        (b"\xff\xfe", "'utf-8' codec can't decode"),
        (b"a = " + b"[" * 10_000, ""),
        (b"[" * 10_000, ""),
        (b'{"a":' * 3_000, ""),
        (b" " * (16 << 10) + b" ", "larger than 16384 bytes"),
    ],
    ids=["brace", "nul", "list", "utf-8", "toml-nested", "nested", "objects", "large"],
)
def test_a_file_that_can_not_be_parsed_is_refused(tmp_path: Path, suffix: str, content: bytes, message: str) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    assert message in refusal(path)
    assert "can't be read" in refusal(path)


def refusal(path: Path) -> str:
    """What is said of a policy file, on one line of bounded length."""
    with pytest.raises(PolicyError) as caught:
        policy_named(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    return message


def test_deep_nesting_is_told_as_such(tmp_path: Path) -> None:
    """Python's own reader ends with a RecursionError, which is no ValueError."""
    for name, content in {"deep.json": "[" * 10_000, "deep.toml": "a = " + "[" * 10_000}.items():
        (tmp_path / name).write_text(content)
        assert "nested too deeply" in refusal(tmp_path / name)


def test_what_may_never_end_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    assert "not a regular file" in refusal(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    assert "not a regular file" in refusal(tmp_path / "folder.json")
    (tmp_path / "device.toml").symlink_to("/dev/zero")
    assert "not a regular file" in refusal(tmp_path / "device.toml")


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ({"name": "x", "gate": {"kind": "none"}, "speed" * 3000: 2}, "speedspeed"),
        ({"name": "x", "gate": {"kind": "none"}, "speed": "v" * 15_000}, "got 'vvv"),
        ({"name": "x", "gate": [[[["deep"]]]] * 1000}, r"got \[\["),
        ({"name": "x", "gate": {"kind": "k" * 15_000}}, "kkk"),
        ({"name": "\x1b[2J", "gate": {"kind": "none"}}, r"name: allowed are .* printable characters, got '\\x1b\[2J'"),
        ({"name": "n" * 81, "gate": {"kind": "none"}}, "name: allowed are 1 to 80"),
        ({"name": "", "gate": {"kind": "none"}}, "name: allowed are 1 to 80"),
        ({"name": "x", "gate": {"kind": "none"}, "\x1b[2J\n": 1}, r"\\x1b\[2J\\n: Extra"),
    ],
)
def test_what_was_given_is_shown_in_brief_and_escaped(tmp_path: Path, content: object, shown: str) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(content))
    assert re.search(shown, refusal(tmp_path / "bad.json"))


@pytest.mark.parametrize("field", ["speedup", "gamma", "band", "adaptivity", "memory", "offset_margin"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e300"])
def test_numbers_must_be_finite_and_in_range(tmp_path: Path, field: str, value: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f'name = "x"\n[gate]\nkind = "adacorrection"\n{field} = {value}\n')
    assert f"gate.adacorrection.{field}: " in refusal(path)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("teacache@0.3+adacorrection@2", "teacache@0.3+adacorrection@2"),
        ("every-fourth", "FILE"),
        ("every-fourth+adacorrection@2", "FILE+adacorrection@2"),
        ("l2c@router.json+paper-lazy", "l2c@FILE+paper-lazy"),
        ("a+b", "FILE"),
    ],
)
def test_in_a_command_a_policy_of_a_file_is_named_by_its_file(name: str, word: str) -> None:
    """Its name says nothing to a command, which would refuse it."""
    assert word_for_commands(name) == word
    assert all(word_for_commands(preset) == preset for preset in PRESETS)


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
    assert needing == {"scheduled", "scheduled-blocks", "robust", "robust-lag", "robust-blocks", "paper-lazy"}
    assert DEFAULT_POLICY in PRESETS


def test_a_policy_decides_only_where_its_gate_can_read() -> None:
    assert {name for name, policy in PRESETS.items() if policy.lags} == {"robust-lag"}
    assert policy_named("robust-lag@3").lags
    for name, placement in (("paper-lazy", "lag"), ("paper-exact", "step"), ("robust", "block"), ("fora", "lag")):
        with pytest.raises(ValidationError, match=rf"decide is {placement}; this gate, with this predictor, takes"):
            Policy.model_validate({**PRESETS[name].model_dump(by_alias=True), "decide": placement})


@pytest.mark.parametrize("gate", [{"kind": "paper"}, {"kind": "paper", "lazy": True}])
def test_the_device_decides_for_gates_that_keep_one_evaluation_of_a_block(gate: dict[str, object]) -> None:
    raw = {"name": "mine", "gate": gate, "decide": "device"}
    for kind in ("hold", "gated"):
        policy = Policy.model_validate({**raw, "predictor": {"kind": kind}})
        assert policy.placement is Placement.DEVICE and not policy.lags
        assert policy.placements == (Placement.BLOCK, Placement.DEVICE), "the host decides where nobody asks"
    with pytest.raises(ValidationError, match="decide is device; this gate, with this predictor, takes block"):
        Policy.model_validate({**raw, "predictor": {"kind": "gated-taylor"}})


def test_fewer_steps_is_the_only_policy_that_changes_the_sampler() -> None:
    assert PRESETS["fewer-steps"].sampled_steps(50) == 25
    assert all(policy.sampled_steps(50) == 50 for name, policy in PRESETS.items() if name != "fewer-steps")


def test_the_longest_history_is_three() -> None:
    assert max(Predictor(kind=kind, order=2).history for kind in PredictorKind) == 3


@pytest.mark.parametrize("kind", ["hold", "gated-taylor"])
def test_a_gate_that_compares_what_is_kept_takes_no_units(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"name": "x", "gate": {"kind": "adacache"}, "predictor": {"kind": kind}}))
    with pytest.raises(PolicyError, match=f"predictor {kind} keeps units; gate adacache compares what is kept"):
        policy_named(str(path))


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


@pytest.mark.parametrize("name", ["robust@nan", "robust@inf", "robust@" + "9" * 5000, "fora@" + "9" * 5000, "x" * 5000])
def test_a_name_that_says_nothing_is_refused_in_brief(name: str) -> None:
    with pytest.raises(PolicyError) as caught:
        policy_named(name)
    assert len(str(caught.value)) < 500

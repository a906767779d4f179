"""A calibration file is untrusted, and holds for one key only."""

from __future__ import annotations

import json
import math
import re

import pytest

from adacorr_deploy.caching.calibration import calibration_for_run, calibration_from_json, check_blocks
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.core.errors import CalibrationError
from adacorr_deploy.core.specs import ModelSpec
from tests.caching.scripted_calibration import calibration
from tests.models import model_spec


def test_a_round_trip_through_json_changes_nothing() -> None:
    original = calibration()
    assert calibration_from_json(original.model_dump_json(), where="here") == original


def refusal(raw: dict[str, object]) -> str:
    """What is said of a file with this content, on one line of bounded length, with the command that makes it anew."""
    with pytest.raises(CalibrationError) as caught:
        calibration_from_json(json.dumps(raw), where="here")
    message = str(caught.value)
    assert message.startswith("here: ")
    assert "\n" not in message
    assert len(message) < 500
    assert "adacorr-calibrate" in message
    return message


def altered(path: str, value: object) -> dict[str, object]:
    """The JSON of a good calibration with another value at a path such as `skip_costs.3.0`."""
    raw = json.loads(calibration().model_dump_json())
    *before, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = raw
    for key in before:
        place = place[key]
    place[last] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 9, "schema_version"),
        ("skip_costs", [], "skip_costs has 0 steps, allowed are the key's 12"),
        ("images", 0, "images: .* got 0"),
        ("images", 10**9, "images: .* got 1000000000"),
        ("surprise", "x" * 10**6, "surprise: Extra .* got 'xxx"),
        ("x" * 10**6, 1, "xxx"),
        ("a\x1b[2J\nb", 1, r"a\\x1b\[2J\\nb: Extra"),
        ("paper_floors", [], "paper_floors: "),
        ("paper_floors", [2.0], "probe.block is 1, allowed are 0 … 0"),
        ("paper_floors.0", 1e300, r"paper_floors.0: .* less than or equal to 1000000000000, got 1e\+300"),
        ("offset_limits", [], "offset_limits has 0 steps, allowed are the key's 12"),
        ("offset_limits", [[-1.0]] * 12, "offset_limits"),
        ("offset_limits.3", [0.1], r"offset_limits.3 has rows of \[1, 1, 1\] numbers, allowed are 3 of 3"),
        ("offset_limits.3", [], "offset_limits.3: "),
        ("offset_limits.3.1", math.nan, "offset_limits.3.1: .*finite.* got nan"),
        ("skip_costs.4.1.2", 1e308, r"skip_costs.4.1.2: allowed are 1e-30 … 1e\+12, and Infinity .* got 1e\+308"),
        ("skip_costs.4.1.2", 1e-320, "skip_costs.4.1.2: allowed .* got 1e-320"),
        ("skip_costs.4.1.2", 0, "skip_costs.4.1.2: allowed .* got 0"),
        ("skip_costs.4.1.2", math.nan, "skip_costs.4.1.2: allowed .* got nan"),
        ("skip_costs.4.1.2", -math.inf, "skip_costs.4.1.2: allowed .* got -inf"),
        ("skip_costs.4.1.2", "x" * 10**6, "skip_costs.4.1.2: .* got 'xxx"),
        ("skip_costs.4.1.2", [[[]]], r"skip_costs.4.1.2: .* got \[\["),
        ("skip_costs.4", [], "skip_costs.4: .* at least 1 item"),
        ("skip_costs.4", [[]], "skip_costs.4.0: .* at least 1 item"),
        ("skip_costs", [[[]]], "skip_costs.0.0: .* at least 1 item"),
        ("skip_costs.4.1", [1e-4, 2e-4], r"skip_costs.4 has rows of \[3, 2, 3\] numbers, allowed are 3 of 3"),
        ("skip_costs.4", [[1e-4, 2e-4, 3e-4]], r"skip_costs.4 has rows of \[3\] numbers, allowed are 3 of 3"),
        ("skip_costs.4.1", [1.0] * 65, "skip_costs.4.1: .* at most 64 items"),
        ("skip_costs.4.1", [2e-4, 1e-4, 3e-4], "skip_costs.4.1 says that 2 skipped steps cost 0.0001, .* 0.0002 of 1"),
        ("skip_costs.4.1", [1e-4, math.inf, 3e-4], "skip_costs.4.1 says that 3 .* at least the inf of 2"),
        ("probe.expected", [[[]]], "probe.expected.0.0: .* at least 1 item"),
        ("probe.expected", [[[0.1] * 3] * 3] * 11, "probe.expected has 11 steps, allowed are the key's 12"),
        ("probe.expected.2.1.0", math.inf, "probe.expected.2.1.0: allowed are 1e-09 … .* got inf"),
        ("probe.expected.2.1.0", 1e-320, "probe.expected.2.1.0: allowed .* got 1e-320"),
        ("probe.expected.2", [[0.1] * 2] * 3, r"probe.expected.2 has rows of \[2, 2, 2\] numbers, allowed are 3 of 3"),
        ("probe.slope", math.nan, "probe.slope"),
        ("probe.block", 50, "probe.block is 50, allowed are 0 … 1"),
        ("key.steps", 13, "skip_costs has 12 steps, allowed are the key's 13"),
        ("key.steps", 10**9, "key.steps"),
        ("key.guidance", 1e38, "key.guidance: .* less than or equal to 100"),
        ("key.sampler", "x\ny", "key.sampler"),
        ("key.checkpoint_sha256", "1", "key.checkpoint_sha256"),
        ("key.latent_shape", [1, 0, 4], "key.latent_shape.1"),
    ],
)
def test_a_value_that_no_calibration_holds_is_refused_by_its_field(path: str, value: object, message: str) -> None:
    assert re.search(message, refusal(altered(path, value)))


def test_a_refusal_gives_the_command_that_makes_the_same_calibration() -> None:
    command = "adacorr-calibrate BUNDLE --sampler ddim --steps 12 --guidance 4 --predictor gated-taylor --order 1"
    assert refusal(altered("probe.block", 50)).endswith(f". Make it again with: {command}")
    assert refusal(altered("key.guidance", 3.0000001) | {"images": 0}).count("--guidance 3.0000001 ") == 1
    assert refusal(altered("key", "lost")).endswith(". Make it again with: adacorr-calibrate BUNDLE")


@pytest.mark.parametrize("text", ["{", "", "[" * 10**6, '{"key":' * 10**5, b"\xff\xfe", "null"])
def test_text_that_is_no_calibration_is_refused(text: str | bytes) -> None:
    with pytest.raises(CalibrationError, match=r"^here: .{1,300}$"):
        calibration_from_json(text, where="here")


def test_a_predictor_of_whole_steps_has_its_probe_in_the_first_block() -> None:
    good = calibration(predictor=Predictor(kind=PredictorKind.OUTPUT_TAYLOR))
    raw = json.loads(good.model_dump_json())
    raw["probe"]["block"] = 1
    assert "probe.block is 1, allowed are 0 … 0" in refusal(raw)


def test_costs_may_be_infinite_from_some_number_of_skipped_steps_on() -> None:
    raw = altered("skip_costs.4.1", [1e-4, "Infinity", "Infinity"])
    assert calibration_from_json(json.dumps(raw), where="here").skip_costs[4][1] == (1e-4, math.inf, math.inf)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_calibration_of_another_number_of_blocks_is_refused(blocks: int) -> None:
    check_blocks(calibration(), model_of(blocks=2), where="here")
    allowed = f"paper_floors holds 2 numbers, allowed are {blocks}: one for .* BUNDLE --sampler ddim --steps 12"
    with pytest.raises(CalibrationError, match=f"^here: {allowed}"):
        check_blocks(calibration(), model_of(blocks=blocks), where="here")


def model_of(*, blocks: int) -> ModelSpec:
    return model_spec(width=4, num_classes=3, units=(2,) * blocks)


@pytest.mark.parametrize("field", ["checkpoint_sha256", "sampler", "steps", "guidance", "latent_shape"])
def test_a_run_with_another_key_is_refused_with_the_difference(field: str) -> None:
    other = {"checkpoint_sha256": "1" * 64, "sampler": "ddpm", "steps": 30, "guidance": 1.5, "latent_shape": (1, 8, 8)}
    key = calibration().key.model_copy(update={field: other[field]})
    with pytest.raises(CalibrationError, match=field):
        calibration_for_run([calibration()], key, Predictor(), policy="robust")


def test_without_any_calibration_the_command_that_makes_one_is_given() -> None:
    with pytest.raises(CalibrationError, match="adacorr-calibrate BUNDLE --sampler ddim --steps 12 --guidance 4"):
        calibration_for_run([], calibration().key, None, policy="robust")


def test_the_matching_calibration_is_found() -> None:
    mine = calibration()
    assert calibration_for_run([mine], mine.key, Predictor(), policy="robust") is mine
    assert calibration_for_run([mine], mine.key, None, policy="paper-lazy") is mine


def test_a_calibration_of_another_predictor_is_refused_with_the_command_for_this_one() -> None:
    mine = calibration()
    other = Predictor(kind=PredictorKind.OUTPUT_TAYLOR)
    with pytest.raises(CalibrationError, match="--predictor output-taylor --order 1"):
        calibration_for_run([mine], mine.key, other, policy="robust")

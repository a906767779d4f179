"""What gates by step index and by mask evaluate, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adacorr_deploy.caching.decisions import SpanCache
from adacorr_deploy.caching.policy import PRESETS, policy_named
from adacorr_deploy.core.errors import PolicyError
from tests.caching.driven import drive, made


def test_deepcache_reuses_the_middle_blocks_between_every_third_step() -> None:
    controller = made(PRESETS["deepcache"], steps=8, blocks=5)
    assert [(span.first, span.stop, span.cache) for span in controller.spans] == [
        (0, 1, SpanCache.NONE),
        (1, 4, SpanCache.RESIDUAL),
        (4, 5, SpanCache.NONE),
    ]
    driven = drive(controller, 8)
    assert driven.evaluated(1) == [0, 3, 6]
    assert driven.evaluated(0) == driven.evaluated(2) == list(range(8))
    assert driven.asked == []


def test_deepcache_counts_blocks_of_two_halves() -> None:
    spans = made(PRESETS["deepcache"], steps=8, blocks=10, halves=True).spans
    assert [(span.first, span.stop) for span in spans] == [(0, 2), (2, 8), (8, 10)]


def test_taylorseer_extrapolates_the_residual_of_all_blocks_between_every_fifth_step() -> None:
    controller = made(policy_named("taylorseer"), steps=16, blocks=4)
    assert [(span.first, span.stop, span.cache) for span in controller.spans] == [(0, 4, SpanCache.RESIDUAL)]
    assert drive(controller, 16).evaluated() == [0, 1, 2, 4, 9, 14]


def mask_file(folder: Path, content: object) -> str:
    path = folder / "mask.json"
    path.write_text(json.dumps(content))
    return f"static-mask@{path}"


def test_a_mask_says_which_part_is_evaluated_at_which_step(tmp_path: Path) -> None:
    policy = policy_named(mask_file(tmp_path, {"rows": ["11", "01", "10", "00"]}))
    driven = drive(made(policy, steps=4), 4)
    assert driven.evaluated(0) == [0, 2]
    assert driven.evaluated(1) == [0, 1]


def test_one_digit_stands_for_all_parts(tmp_path: Path) -> None:
    driven = drive(made(policy_named(mask_file(tmp_path, {"rows": ["1", "0", "1"]})), steps=3), 3)
    assert driven.evaluated(0) == driven.evaluated(1) == [0, 2]


def test_a_router_evaluates_where_its_score_is_above_the_threshold(tmp_path: Path) -> None:
    """Learning-to-Cache: θ = 0.1, every second step in full."""
    path = tmp_path / "router.json"
    path.write_text(json.dumps({"scores": [[1, 1], [0.05, 0.4], [1, 1], [0.1, 0.11]]}))
    driven = drive(made(policy_named(f"l2c@{path}"), steps=4), 4)
    assert driven.evaluated(0) == [0, 2]  # not above: 0.05, 0.1
    assert driven.evaluated(1) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": ["11", "1"]}, "strings of 2 and of 1 digits"),
        ({"rows": ["10", "11"]}, "first string is all 1"),
        ({"rows": ["1x"]}, "digits, each 1"),
        ({"rows": []}, "rows"),
        ({"row": ["1"]}, "row"),
        (["1"], "allowed is a JSON file"),
    ],
)
def test_a_mask_that_is_none_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        policy_named(mask_file(tmp_path, content))


@pytest.mark.parametrize(
    ("steps", "blocks", "message"),
    [(4, 2, "rows has 3 steps, the run 4. Give --steps 3"), (3, 4, "for 2 block parts, the bundle has 4")],
)
def test_a_mask_of_another_run_or_bundle_is_refused(tmp_path: Path, steps: int, blocks: int, message: str) -> None:
    policy = policy_named(mask_file(tmp_path, {"rows": ["11", "01", "10"]}))
    with pytest.raises(PolicyError, match=message):
        made(policy, steps=steps, blocks=blocks)


@pytest.mark.parametrize("name", ["static-mask", "l2c", "l2c@router.pt"])
def test_a_policy_without_its_file_says_what_the_file_holds(name: str) -> None:
    with pytest.raises(PolicyError, match=r"needs a JSON file, .* Give it as .*@FILE.json"):
        policy_named(name)


def test_too_few_blocks_for_the_first_that_are_evaluated_are_refused() -> None:
    with pytest.raises(PolicyError, match="the first 8 and the last 0 blocks, and the bundle has 6"):
        made(PRESETS["dbcache"], steps=8, blocks=6)

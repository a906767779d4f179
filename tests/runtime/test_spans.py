"""Spans do what their mathematics says: residuals are what a range adds, and a range that is reused is not launched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adacorr_deploy.caching.decisions import (
    Action,
    Affine,
    Kept,
    Observation,
    Observed,
    Span,
    SpanCache,
    unit_spans,
    whole_step_spans,
)
from adacorr_deploy.core.errors import PolicyError
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.layout import check_spans, own_layout, token_places
from adacorr_deploy.runtime.planned_run import planned_run
from tests.runtime.conftest import write_bundle
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.scripted import PlainRun, Script, always, f32
from tests.runtime.spanned import AFFINE, PARTS, PROBE, PlainSpans, SpanScript, at_random, divisions
from tests.runtime.tiny_dit import HALVES, TinyDiT

RTOL, ATOL = 1e-4, 1e-5  # float32; differences of tokens of up to about 10 lose a few bits
REQUEST = SampleRequest((0, 2), steps=6, guidance=3.0, seed=7)
EXAMPLES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ACTIONS = st.lists(st.sampled_from(list(Action)), min_size=1, max_size=18)
WATCHED = st.sampled_from([*(Observation(what=w, kept=k) for w in list(Observed)[:3] for k in Kept), PROBE])

RANGE = (Span(first=0, stop=PARTS, cache=SpanCache.RESIDUAL),)
BEHIND_THE_FIRST = (
    Span(first=0, stop=1, cache=SpanCache.NONE),
    Span(first=1, stop=PARTS, cache=SpanCache.RESIDUAL),
)


def every(period: int, division: tuple[Span, ...], **more: object) -> SpanScript:
    choose = lambda step, span: Action.EVALUATE if step % period == 0 else Action.REUSE  # noqa: E731
    return SpanScript(choose=choose, division=division, **more)  # type: ignore[arg-type]


@EXAMPLES
@given(
    division=divisions(),
    actions=ACTIONS,
    coefficients=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=3),
    watched=st.dictionaries(st.integers(0, PARTS - 1), st.lists(WATCHED, max_size=3, unique=True), max_size=3),
    maps=st.dictionaries(st.integers(0, PARTS - 1), st.just(AFFINE), max_size=2),
    compares=st.booleans(),
    history=st.integers(1, 3),
)
def test_rings_and_launches_compute_what_plain_lists_do(
    bundle: Path,
    model: TinyDiT,
    division: tuple[Span, ...],
    actions: list[Action],
    coefficients: list[float],
    watched: Mapping[int, Sequence[Observation]],
    maps: Mapping[int, Affine],
    compares: bool,
    history: int,
) -> None:
    caching = [index for index, span in enumerate(division) if span.cache is not SpanCache.NONE]
    watched = {
        i: [each for each in several if i > 0 or each.what is not Observed.RESIDUAL]
        for i, several in watched.items()
        if i in caching
    }
    script = SpanScript(
        choose=at_random(actions, len(division)),
        division=division,
        coefficients=tuple(coefficients[:history]),
        watched=watched,
        affines={i: a for i, a in maps.items() if i in caching and division[i].cache is SpanCache.RESIDUAL},
        compares=compares,
        wants_signals=True,
    )
    plain = PlainSpans(model, REQUEST, script, history)
    expected = plain.latents()
    with Pipeline.open(bundle, backend=FakeBackend.of(model)) as pipeline:
        result = pipeline.sample(REQUEST, script, history=history)
    np.testing.assert_allclose(result.latents, expected, rtol=RTOL, atol=ATOL * max(1.0, float(np.abs(expected).max())))
    assert result.launches == result.trace.launches
    assert script.measured.keys() == plain.rows.keys()
    for key, branches in script.measured.items():
        rows = plain.rows[key].reshape(2, REQUEST.batch, -1)  # branches, images
        if watched[key[1]][key[2]].what is Observed.PROBE:
            probes = np.asarray([b.probe for b in branches], dtype=np.float64)
            np.testing.assert_allclose(probes, rows.mean(axis=1)[:, 0], rtol=1e-3, atol=1e-3)
        else:
            np.testing.assert_allclose([b.change_l1 for b in branches], rows[..., 5].mean(axis=1), rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(
                [b.reference_square for b in branches], rows[..., 8].mean(axis=1), rtol=1e-3, atol=1e-3
            )
    residual = {key: rows for key, rows in plain.change_rows.items() if compares}
    assert script.changes.keys() == residual.keys()
    for at, branches in script.changes.items():
        rows = residual[at].reshape(2, REQUEST.batch, -1)
        np.testing.assert_allclose([b.change_l1 for b in branches], rows[..., 5].mean(axis=1), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kept", list(Kept))
def test_what_is_observed_does_not_depend_on_what_the_request_before_observed(
    bundle: Path, model: TinyDiT, kept: Kept
) -> None:
    """Requests of one size take over each other's workspace and its bound launches, whatever their gates watch."""

    def watching(what: Observed) -> SpanScript:
        return every(3, BEHIND_THE_FIRST, watched={1: (Observation(what=what, kept=kept),)}, wants_signals=True)

    fresh = {what: watching(what) for what in list(Observed)[:3]}
    for script in fresh.values():
        with Pipeline.open(bundle, backend=FakeBackend.of(model)) as pipeline:
            pipeline.sample(REQUEST, script, history=1)
    with Pipeline.open(bundle, backend=FakeBackend.of(model)) as pipeline:
        for what in (*fresh, *fresh):
            script = watching(what)
            pipeline.sample(REQUEST, script, history=1)
            assert script.signals == fresh[what].signals, what
            assert script.signals


def test_a_reused_range_is_not_launched_and_costs_one_launch(pipeline: Pipeline, backend: FakeBackend) -> None:
    result = pipeline.sample(REQUEST, every(3, RANGE), history=1)
    after = backend.order[backend.order.index("head") + 1 :]
    assert after[: after.index("head")] == ["embed", "combine_1"], "a reused step"
    assert sum(part == "combine_1" for part in backend.order) == 4 + 2, "one to reuse, one to keep"
    assert result.launches == result.trace.launches == 2 * PARTS
    assert result.rho == pytest.approx(4 / 6)
    assert [record.block for record in result.trace.records if record.step == 1][::2] == list(result.trace.blocks)


def test_a_reused_range_is_its_input_and_the_kept_residual_exactly(pipeline: Pipeline, model: TinyDiT) -> None:
    """Not one rounding more than fl(x' + fl(y − x))."""
    script = every(2, RANGE)
    request = SampleRequest((1,), steps=2, guidance=1.0, seed=3)
    run = planned_run(pipeline.manifest, request, script, history=1)
    plain = PlainSpans(model, request, script, 1)
    plain.latents()
    with pipeline.lease(run.size, references=run.references) as (space, slots):
        run.start(space, slots, progress=None, cancelled=None).run()
        np.testing.assert_array_equal(space.slots.spans[0].ring[0][0].read(), plain.residuals[0, 0])
        expected = plain.inputs[1, 0] + plain.residuals[0, 0]
        np.testing.assert_array_equal(space.block_output(PARTS - 1).read(), expected)


@pytest.mark.parametrize("coefficients", [(1.0,), (2.0, -1.0), (3.0, -3.0, 1.0)])
def test_a_range_that_is_held_is_its_parts_held_one_by_one(pipeline: Pipeline, coefficients: tuple[float, ...]) -> None:
    """Y + Σ (parts' residuals) is the same sum in another order."""
    parts = tuple(Span(first=part, stop=part + 1, cache=SpanCache.RESIDUAL) for part in range(PARTS))
    results = [
        pipeline.sample(REQUEST, every(2, division, coefficients=coefficients), history=len(coefficients)).latents
        for division in (RANGE, parts)
    ]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_residuals_of_single_parts_are_their_units_with_the_gates_of_their_own_step(pipeline: Pipeline) -> None:
    """`residual` of a part is `hold` of its units: two ways to keep the same thing."""
    parts = tuple(Span(first=part, stop=part + 1, cache=SpanCache.RESIDUAL) for part in range(PARTS))
    of_units = Script(
        choose=lambda step, block: Action.EVALUATE if step % 3 == 0 else Action.REUSE, present_gates=False
    )
    found, expected = (pipeline.sample(REQUEST, script, history=1) for script in (every(3, parts), of_units))
    np.testing.assert_allclose(found.latents, expected.latents, rtol=1e-4, atol=1e-4)


@EXAMPLES
@given(division=divisions())
def test_spans_that_are_always_evaluated_change_no_bit(
    bundle: Path, model: TinyDiT, division: tuple[Span, ...]
) -> None:
    expected = PlainRun(model, REQUEST, Script(), 1).latents()
    with Pipeline.open(bundle, backend=FakeBackend.of(model)) as pipeline:
        for history in (0, 2):
            script = SpanScript(choose=always(Action.EVALUATE), division=division)
            np.testing.assert_array_equal(pipeline.sample(REQUEST, script, history=history).latents, expected)


def test_slots_of_spans_are_cleared_and_the_next_request_is_the_same(pipeline: Pipeline) -> None:
    script = every(2, BEHIND_THE_FIRST, watched={1: (Observation(what=Observed.RESIDUAL),)}, wants_signals=True)
    run = planned_run(pipeline.manifest, REQUEST, script, history=1)
    first = pipeline.sample(REQUEST, script, history=1)
    with pipeline.lease(run.size, references=run.references) as (space, _):
        slot = space.slots.spans[1]
        assert not slot.history.steps
        assert not slot.ring.read().any()
        assert slot.reference is not None
        assert not slot.reference.read().any()
    np.testing.assert_array_equal(pipeline.sample(REQUEST, script, history=1).latents, first.latents)


def test_an_affine_map_of_one_request_is_not_the_next_ones(pipeline: Pipeline) -> None:
    plain = pipeline.sample(REQUEST, every(2, RANGE), history=1).latents
    mapped = pipeline.sample(REQUEST, every(2, RANGE, affines={0: AFFINE}), history=1).latents
    assert np.abs(mapped - plain).max() > 1e-3
    np.testing.assert_array_equal(pipeline.sample(REQUEST, every(2, RANGE), history=1).latents, plain)


def test_errors_of_a_range_are_those_of_its_output(pipeline: Pipeline, model: TinyDiT) -> None:
    script = every(2, RANGE, measures=True)
    plain = PlainSpans(model, REQUEST, script, 1)
    plain.latents()
    pipeline.sample(REQUEST, script, history=1)
    assert script.errors.keys() == {(2, 0), (4, 0)}
    fresh = plain.inputs[2, 0] + plain.residuals[2, 0]
    predicted = plain.inputs[2, 0] + plain.residuals[0, 0]
    rows = np.linalg.norm(predicted - fresh, axis=2) / np.linalg.norm(fresh, axis=2)
    images = np.sqrt(np.square(rows).mean(axis=1)).reshape(2, 2).max(axis=0)  # the larger branch of each image
    assert script.errors[2, 0] == pytest.approx(np.exp(np.log(images).mean()), rel=1e-3)


def test_whole_steps_compare_outputs(pipeline: Pipeline) -> None:
    script = every(2, whole_step_spans(PARTS), compares=True)
    pipeline.sample(REQUEST, script, history=1)
    assert script.changes.keys() == {(2, 0), (4, 0)}
    ((only,), *_) = script.changes.values()
    assert only.relative_l1 > 0


def test_halves_are_the_same_model_and_one_half_can_be_reused(tmp_path: Path, model: TinyDiT) -> None:
    """Of the `cheap` corrector: attention from the slot, the MLP evaluated on it."""
    halves = TinyDiT(units=HALVES)
    backend = FakeBackend.of(halves)
    choose = lambda step, part: Action.REUSE if step % 2 and part % 2 == 0 else Action.EVALUATE  # noqa: E731
    script = Script(choose=choose, blocks=len(HALVES))
    with Pipeline.open(write_bundle(tmp_path / "halves", halves), backend=backend) as pipeline:
        whole = pipeline.sample(REQUEST, Script(blocks=len(HALVES)), history=1)
        backend.order.clear()
        cheap = pipeline.sample(REQUEST, script, history=1)
    np.testing.assert_array_equal(whole.latents, PlainRun(model, REQUEST, Script(), 1).latents())
    np.testing.assert_allclose(cheap.latents, PlainRun(halves, REQUEST, script, 1).latents(), rtol=RTOL, atol=ATOL)
    launched = [part for part in backend.order if part.startswith("block_")]
    assert sum(part.endswith("_attention") for part in launched) == 3 * len(HALVES) // 2
    assert sum(part.endswith("_mlp") for part in launched) == 6 * len(HALVES) // 2
    assert cheap.launches == cheap.trace.launches == len(launched)


@EXAMPLES
@given(division=divisions(parts=7))
def test_no_part_writes_where_it_or_its_span_reads(division: tuple[Span, ...]) -> None:
    places = token_places(division)
    assert len(places) == 7 + 1
    for span in division:
        for part in span.parts:
            assert places[part + 1] not in (places[part], places[span.first])
    assert max(places) <= (2 if any(len(span.parts) > 1 for span in division) else 1)


def test_divisions_of_today_need_no_layout_of_their_own() -> None:
    assert own_layout(unit_spans(4), 4) == own_layout(whole_step_spans(4), 4) == ()
    assert own_layout(RANGE, PARTS) == RANGE


@pytest.mark.parametrize(
    ("division", "why"),
    [
        ((), "hold every part once"),
        (RANGE[:1] * 2, "begin where the one before stops"),
        (BEHIND_THE_FIRST[:1], "hold every part once"),
        ((Span(first=0, stop=0, cache=SpanCache.NONE), *RANGE), "hold every part once"),
        ((Span(first=0, stop=PARTS, cache=SpanCache.UNITS),), "must be a single part"),
        ((BEHIND_THE_FIRST[0], Span(first=1, stop=PARTS, cache=SpanCache.OUTPUT)), "must be the whole step"),
    ],
)
def test_a_division_that_can_not_be_run_is_refused(pipeline: Pipeline, division: tuple[Span, ...], why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        check_spans(division, PARTS)
    with pytest.raises(PolicyError, match=why):
        pipeline.sample(REQUEST, SpanScript(division=division), history=1)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (SpanScript(division=unit_spans(PARTS), affines={0: AFFINE}), "maps span 0, which keeps units"),
        (SpanScript(division=RANGE, affines={0: Affine(scale=(1.0,), shift=(0.0,))}), "brings 1 numbers for scale 0"),
        (
            SpanScript(division=RANGE, watched={0: (Observation(what=Observed.RESIDUAL),)}, wants_signals=True),
            "what the span before the first added",
        ),
    ],
)
def test_what_a_span_can_not_do_is_refused_with_its_reason(pipeline: Pipeline, script: SpanScript, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        pipeline.sample(REQUEST, script, history=1)


def test_memory_of_a_layout_is_what_its_spans_keep(pipeline: Pipeline, backend: FakeBackend) -> None:
    sizes = {}
    for name, division in {"range": RANGE, "units": unit_spans(PARTS)}.items():
        before = len(backend.buffers)
        pipeline.sample(REQUEST, SpanScript(division=division), history=3)
        sizes[name] = sum(buffer.values.size for buffer in backend.buffers[before:])
    tokens = f32(np.empty((4, 4, 4))).size
    kept_units, kept_range, sinks = 3 * 8 * tokens, 3 * tokens, (2 + 4) * tokens
    assert sizes["units"] - sizes["range"] == pytest.approx(kept_units - kept_range - sinks - tokens, abs=2 * tokens)

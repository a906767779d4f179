"""Rows are dealt into launches that take them in the least time, of buckets in which a row computes alike."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from adacorr_deploy.runtime.batch_buckets import Buckets, BucketTrial, agreeing_buckets

SIZES = st.sets(st.integers(1, 12), min_size=1, max_size=4).map(sorted)


def buckets(seconds: dict[int, float]) -> Buckets:
    return Buckets(seconds=seconds, identical=True)


def trial(seconds: float, result: bytes | None = b"same") -> BucketTrial:
    return BucketTrial(seconds=seconds, result=result)


@given(SIZES, st.data(), st.integers(1, 30))
def test_every_row_has_a_place_and_no_other_launches_are_cheaper(
    sizes: list[int], data: st.DataObject, rows: int
) -> None:
    costs = data.draw(st.lists(st.integers(1, 50), min_size=len(sizes), max_size=len(sizes)).map(sorted))
    seconds = {size: float(cost) for size, cost in zip(sizes, costs, strict=True)}
    dealt = buckets(seconds).deal(rows)
    assert sum(dealt) >= rows
    assert sum(dealt[:-1]) < rows  # the last launch, too, has somebody in it
    assert list(dealt) == sorted(dealt, reverse=True)
    full, rest = divmod(rows, sizes[-1])
    if rest <= 4:  # few enough to try all
        choices = (itertools.combinations_with_replacement(sizes, count) for count in range(rest + 1))
        rivals = (chosen for chosen in itertools.chain(*choices) if sum(chosen) >= rest)
        assert sum(map(seconds.__getitem__, dealt[full:])) == min(sum(map(seconds.__getitem__, c)) for c in rivals)


def test_padding_is_chosen_where_a_launch_costs_more_than_its_rows() -> None:
    assert buckets({1: 1.0, 8: 1.1}).deal(3) == (8,)  # as on a GPU that is far from full
    assert buckets({1: 1.0, 2: 1.9, 8: 7.0}).deal(3) == (2, 1)  # as on a CPU
    assert buckets({2: 1.9, 8: 7.0}).deal(17) == (8, 8, 2)


def test_buckets_that_compute_otherwise_are_left_out() -> None:
    agreeing = agreeing_buckets({1: trial(1, b"a"), 2: trial(2, b"b"), 4: trial(3, b"b"), 8: trial(4, b"c")})
    assert (agreeing.sizes, agreeing.identical) == ((2, 4), True)


def test_of_groups_as_large_the_one_with_the_larger_buckets_is_kept() -> None:
    assert agreeing_buckets({1: trial(1, b"a"), 2: trial(2, b"b")}).sizes == (2,)


def test_a_bucket_whose_rows_differ_from_one_another_is_left_out() -> None:
    assert agreeing_buckets({1: trial(1), 2: trial(2, None), 4: trial(3)}).sizes == (1, 4)


def test_where_none_agrees_with_itself_it_is_said() -> None:
    kept = agreeing_buckets({2: trial(2, None), 4: trial(3, None)})
    assert (kept.sizes, kept.identical) == ((4,), False)


@given(st.dictionaries(st.integers(1, 64), st.floats(1e-6, 10), min_size=1, max_size=6))
def test_a_disturbed_trial_never_makes_larger_launches_dearer_per_row(measured: dict[int, float]) -> None:
    seconds = agreeing_buckets({rows: trial(value) for rows, value in measured.items()}).seconds
    for (fewer, less), (more, most) in itertools.pairwise(seconds.items()):
        assert fewer < more
        assert less <= most
        assert most / more <= less / fewer * (1 + 1e-9)

"""Invariant: labels come out in the order in which they were written, whatever the way."""

from __future__ import annotations

import pytest

from adacorr_deploy.cli.labels import example_labels, labels_from_text
from adacorr_deploy.cli.options import MAX_IMAGES
from adacorr_deploy.core.errors import RequestError

NAMES = ("tench, Tinca tinca", "goldfish", "7")


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (["0,2"], (0, 2)),
        (["2", "0", "2"], (2, 0, 2)),
        (["Goldfish"], (1,)),
        (["tench, Tinca tinca", "goldfish,0"], (0, 1, 0)),
        (["7"], (2,)),  # a class that is called by a number
        (["999,-1,+1"], (999, -1, 1)),  # refused later, by the model's own limits
        ([], (0, 1, 2)),
    ],
)
def test_names_and_numbers_are_read(texts: list[str], labels: tuple[int, ...]) -> None:
    assert labels_from_text(texts, num_classes=3, class_names=NAMES) == labels


def test_many_classes_are_shown_by_eight_of_them() -> None:
    labels = labels_from_text([], num_classes=1000, class_names=None)
    assert labels == (0, 125, 250, 375, 500, 625, 750, 875)
    assert labels_from_text([], num_classes=10, class_names=None) == tuple(range(10))


@pytest.mark.parametrize(
    ("fewest", "most", "labels"),
    [(0, 4, (0, 5, 10, 15)), (0, 100, (0, 2, 5, 7, 10, 12, 15, 17)), (9, 16, (0, 2, 4, 6, 8, 11, 13, 15, 17))],
)
def test_labels_that_nobody_named_are_spread_and_as_many_as_may_be(
    fewest: int, most: int, labels: tuple[int, ...]
) -> None:
    assert example_labels(20, fewest=fewest, most=most) == labels


@pytest.mark.parametrize("text", ["shark", "1,,2", "1.5", "²", "٣", "+-5", "1_0", "9" * 5000])
def test_another_word_is_refused_with_what_is_known(text: str) -> None:
    with pytest.raises(RequestError, match=r"from 0 to 2 nor one of its names: tench, Tinca tinca, goldfish, 7\."):
        labels_from_text([text], num_classes=3, class_names=NAMES)
    with pytest.raises(RequestError, match="from 0 to 2; this bundle has no class names"):
        labels_from_text([text], num_classes=3, class_names=None)


def test_a_thousand_names_are_not_all_listed() -> None:
    with pytest.raises(RequestError, match=r"name 11, …\.$"):
        labels_from_text(["x"], num_classes=1000, class_names=[f"name {label}" for label in range(1000)])


def test_more_images_than_fit_are_refused() -> None:
    assert len(labels_from_text(["1," * (MAX_IMAGES - 1) + "1"], num_classes=3, class_names=NAMES)) == MAX_IMAGES
    with pytest.raises(RequestError, match=r"1025 class labels were given, allowed are 1024\."):
        labels_from_text(["1"] * (MAX_IMAGES + 1), num_classes=3, class_names=NAMES)

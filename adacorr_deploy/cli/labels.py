"""Class labels as people write them: numbers and names, repeated or with commas."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from adacorr_deploy.cli.options import MAX_IMAGES
from adacorr_deploy.core.errors import RequestError

_ALL_CLASSES: Final = 10  # up to this many classes, the default is one image of each
_SOME_CLASSES: Final = 8
_LISTED: Final = 12  # names in a message


def labels_from_text(texts: Sequence[str], *, num_classes: int, class_names: Sequence[str] | None) -> tuple[int, ...]:
    """Return the labels that were asked for; without any, all classes, or some of them where there are many.

    Args:
        texts: Each a name, a number, or several of these between commas. Numbers are checked against the model later.
        num_classes: Of the model.
        class_names: By label, where the bundle has them; case doesn't matter.

    Raises:
        RequestError: If a name is unknown (the message lists the known ones), or there are too many.
    """
    if not texts:
        return example_labels(num_classes)
    by_name = {name.casefold(): label for label, name in enumerate(class_names or ())}
    labels = tuple(label for text in texts for label in _labels(text, by_name, class_names, num_classes))
    if len(labels) > MAX_IMAGES:
        raise RequestError(f"{len(labels)} class labels were given, allowed are {MAX_IMAGES}. Take several runs.")
    return labels


def example_labels(num_classes: int, *, fewest: int = 0, most: int = MAX_IMAGES) -> tuple[int, ...]:
    """Return the labels of runs that name none: all classes, or some of them where there are many.

    Args:
        num_classes: Of the model.
        fewest: Labels that there must be.
        most: Labels that there may be.
    """
    wanted = num_classes if num_classes <= _ALL_CLASSES else _SOME_CLASSES
    images = max(fewest, min(wanted, most))
    return tuple(index * num_classes // images for index in range(images))


def _labels(text: str, by_name: dict[str, int], class_names: Sequence[str] | None, num_classes: int) -> Iterator[int]:
    whole = text.strip().casefold()
    if whole in by_name:  # first, for names that hold a comma themselves
        yield by_name[whole]
        return
    for item in text.split(","):
        word = item.strip()
        if word.casefold() in by_name:
            yield by_name[word.casefold()]
        elif re.fullmatch("[+-]?[0-9]{1,18}", word):
            yield int(word)
        else:
            raise RequestError(f"class label {word!r} is {_allowed(class_names, num_classes)}.")


def _allowed(class_names: Sequence[str] | None, num_classes: int) -> str:
    numbers = f"a whole number from 0 to {num_classes - 1}"
    if class_names is None:
        return f"not {numbers}; this bundle has no class names"
    rest = ", …" if len(class_names) > _LISTED else ""
    return f"neither {numbers} nor one of its names: {', '.join(class_names[:_LISTED])}{rest}"

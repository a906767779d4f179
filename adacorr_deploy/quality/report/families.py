"""Which policies belong together, and the colour and shape that tell them apart: never by colour alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

COLOURS: Final = 7  # of the style sheet, --f0 … --f6, for light and dark
SHAPES: Final = {  # SVG paths around 0, 0, of about the same area
    "circle": "M-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0 -11 0z",
    "square": "M-5 -5h10v10h-10z",
    "diamond": "M0 -7l7 7l-7 7l-7 -7z",
    "triangle": "M0 -6.5l6.5 11.5h-13z",
    "pennant": "M0 6.5l6.5 -11.5h-13z",
    "cross": "M-2 -6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
}
_BASELINES: Final = ("none", "fewer-steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Policies that differ in their target alone, or in what is on top.

    Attributes:
        name: What they have in common.
        style: A class of the style sheet.
        shape: An SVG path.
        ringed: Whether something is on top (`teacache+adacorrection`): drawn as a ring around the same mark.
    """

    name: str
    style: str
    shape: str
    ringed: bool = False


def family_name(policy: str) -> str:
    """Return a policy's name without its target, and without what is on top of it."""
    return policy.partition("@")[0].partition("+")[0]


def families(policies: Sequence[str]) -> dict[str, Family]:
    """Return the family of each policy, by policy; the baselines are grey, the others coloured in their order."""
    names = list(dict.fromkeys(family_name(policy) for policy in policies))
    coloured = [name for name in names if name not in _BASELINES]
    shapes = list(SHAPES.values())
    made = {
        name: Family(name=name, style=f"f{index % COLOURS}", shape=shapes[index % len(shapes)])
        for index, name in enumerate(coloured)
    }
    made |= {name: Family(name=name, style="base", shape=SHAPES["circle"]) for name in _BASELINES}
    return {policy: replace(made[family_name(policy)], ringed="+" in policy) for policy in policies}

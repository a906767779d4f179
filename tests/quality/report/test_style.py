"""Every colour that carries text or a mark stands out from what it lies on, in the light and in the dark (WCAG 2.2)."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

STYLE = (files("adacorr_deploy.quality.report") / "templates" / "report.css").read_text(encoding="utf-8")
TEXT, MARK = 4.5, 3.0  # WCAG 1.4.3 and 1.4.11


def colours(scheme: str) -> dict[str, tuple[float, float, float]]:
    light, dark = (block for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL))
    found = re.findall(r"--([\w-]+): #([0-9a-f]{6})", light if scheme == "light" else dark)
    return {name: tuple(int(code[at : at + 2], 16) / 255 for at in (0, 2, 4)) for name, code in found}  # type: ignore[misc]


def luminance(colour: tuple[float, float, float]) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_can_be_told_from_their_ground(scheme: str) -> None:
    of = colours(scheme)
    assert colours("light").keys() == colours("dark").keys()
    text = ["ink", "soft", "accent", "bad", "base", *(f"f{index}" for index in range(7))]
    weak = [
        (name, ground, contrast(of[name], of[ground]))
        for name in text
        for ground in ("card", "paper")
        if contrast(of[name], of[ground]) < TEXT
    ]
    assert weak == []
    assert contrast(of["ink"], of["note"]) >= TEXT
    assert contrast(of["card"], of["accent"]) >= TEXT  # the chosen button's text
    actions = ("evaluate", "reuse", "correct")
    pairs = [(one, other) for one in actions for other in actions if one < other]
    apart = {pair: contrast(of[pair[0]], of[pair[1]]) for pair in pairs}
    assert apart["evaluate", "reuse"] >= MARK
    assert min(apart.values()) >= 1.5  # and the reader's cursor says which it is

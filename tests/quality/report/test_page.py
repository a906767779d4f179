"""The page is one well-formed document that loads nothing, says everything that was measured, and trusts no name."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Final

from adacorr_deploy.quality.bench import Bench
from adacorr_deploy.quality.report import report_html
from tests.quality.report.conftest import FACTS, FAILURE, HOSTILE

_VOID: Final = {"meta", "link", "img", "input", "br"}
_ADDRESSES: Final = {"src", "href", "action", "data", "poster", "srcset", "xlink:href"}


class Document(HTMLParser):
    """What a page holds; fails where elements are not closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        optional = {"tr", "td", "th", "li", "dt", "dd", "option", "p"}
        while self.open and self.open[-1] != tag and self.open[-1] in optional:
            self.open.pop()
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] == "script" else self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def having(self, tag: str, name: str) -> list[str]:
        return [attributes[name] or "" for kind, attributes in self.elements if kind == tag and name in attributes]


def test_every_row_is_on_the_page_with_its_numbers(page: str, measured: Bench) -> None:
    document = Document(page)
    for row in measured.rows:
        assert row.policy in document.text
        if math.isfinite(row.psnr_db):
            assert f"{row.speedup:.2f}×" in document.text
            assert f"{row.psnr_db:.1f}" in document.text
    assert len([1 for tag, attributes in document.elements if tag == "article"]) == len(measured.rows)
    assert FAILURE in document.text
    assert f"1 of {len(measured.rows)} policies could not be measured" in document.text
    assert "Fréchet" in document.text


def test_the_page_loads_nothing(page: str) -> None:
    document = Document(page)
    addresses = [
        attributes[name] or "" for _, attributes in document.elements for name in _ADDRESSES & attributes.keys()
    ]
    assert addresses
    assert [
        address for address in addresses if not re.match(r"#[\w-]+$|data:(image/png;base64,[\w+/=]+)?,?$", address)
    ] == []
    assert not re.search(r"https?:|//[a-z]|@import|url\(", "".join(re.findall(r"<style>.*?</style>", page, re.DOTALL)))
    (policy,) = [a["content"] for tag, a in document.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none';")


def test_what_names_and_messages_hold_is_text_and_nothing_else(page: str) -> None:
    document = Document(page)
    assert document.having("img", "onerror") == []
    assert "<i>imagined</i>" in document.text
    assert "tiny & <small>" in document.text
    assert HOSTILE in document.having("article", "data-policy")
    assert "<img src=x" not in page


def test_a_reason_can_not_end_the_script_that_holds_it(measured: Bench) -> None:
    run = measured.runs["fora"]
    assert run.sampled is not None
    trajectory = run.sampled.trajectory
    reasons = trajectory.decisions.reasons.astype("U40")
    reasons[0, 0] = "</script><!--<script>"
    decisions = replace(trajectory.decisions, reasons=reasons)
    evil = replace(run, sampled=replace(run.sampled, trajectory=replace(trajectory, decisions=decisions)))
    document = Document(report_html(replace(measured, runs={**measured.runs, "fora": evil}), FACTS))
    cells = [json.loads(script) for script in document.scripts if script.startswith('{"actions"')]
    assert [reason for cell in cells for reason in cell["reasons"] if "<!--" in reason] == ["</script><!--<script>"]


def test_the_maps_data_are_the_traces_decisions(page: str, measured: Bench) -> None:
    cells = [json.loads(script) for script in Document(page).scripts if script.startswith('{"actions"')]
    runs = [run.sampled for run in measured.runs.values() if run.sampled is not None]
    assert len(cells) == len(runs)
    for found, sampled in zip(cells, runs, strict=True):
        actions = [[found["actions"][index] for index in row] for row in found["action"]]
        assert actions == sampled.trajectory.decisions.actions.T.tolist()
        reasons = [[found["reasons"][index] for index in row] for row in found["reason"]]
        assert reasons == sampled.trajectory.decisions.reasons.T.tolist()


def test_a_bench_of_nothing_but_the_uncached_run_makes_a_page_too(measured: Bench) -> None:
    alone = replace(measured, rows=[replace(measured.rows[0], sets=None)], runs={"none": measured.runs["none"]})
    document = Document(report_html(alone, FACTS))
    assert "1 policy on the same requests" in document.text
    assert [tag for tag, _ in document.elements if tag == "figure"]  # its images


def test_every_reference_inside_the_page_leads_somewhere(page: str) -> None:
    document = Document(page)
    anchors = [attributes["id"] for _, attributes in document.elements if "id" in attributes]
    assert len(anchors) == len(set(anchors))
    targets = {address[1:] for address in document.having("a", "href")}
    named = {name for _, attributes in document.elements for name in (attributes.get("aria-labelledby") or "").split()}
    assert targets | named <= set(anchors)

"""What a dashboard asks for exists, and what happened is handed on once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from adacorr_deploy.serving import metrics
from adacorr_deploy.serving.metrics import IMAGES, LAUNCHES, METRICS, RHO, Metric, MetricKind, Recorder
from adacorr_deploy.serving.repository import Repository
from tests.serving.scripted_engine import ScriptedStats

TRITONS_OWN = {"nv_inference_pending_request_count"}


class ListingSink:
    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []

    def increment(self, metric: Metric, value: float, label: str | None = None) -> None:
        assert label is None or label in metric.values
        self.calls.append((metric.name, value))

    def set(self, metric: Metric, value: float) -> None:
        assert metric.kind is MetricKind.GAUGE

    def observe(self, metric: Metric, value: float) -> None:
        assert metric.kind is MetricKind.HISTOGRAM
        self.calls.append((metric.name, value))


def test_what_happened_is_handed_on_once() -> None:
    sink = ListingSink()
    recorder = Recorder(sink)
    recorder.count(IMAGES, 2)
    recorder.count(IMAGES, 3)
    recorder.observe(RHO, 0.25)
    recorder.flush(ScriptedStats(launches=40, guard_trips=0))
    assert sorted(sink.calls) == sorted([(RHO.name, 0.25), (IMAGES.name, 5), (LAUNCHES.name, 40)])
    recorder.flush(ScriptedStats(launches=42, guard_trips=0))
    assert sink.calls[3:] == [(LAUNCHES.name, 2)]


def test_every_metric_is_in_the_table_once() -> None:
    defined = [value for value in vars(metrics).values() if isinstance(value, Metric)]
    assert sorted(metric.name for metric in defined) == sorted(metric.name for metric in METRICS)


def expressions(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "expr":
                yield value
            yield from expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from expressions(value)


def test_the_dashboard_asks_for_series_that_exist_and_for_every_metric(repository: Repository) -> None:
    dashboard = json.loads((repository.path / "grafana-dashboard.json").read_text())
    asked = {name for text in expressions(dashboard) for name in re.findall(r"\b(?:adacorr|nv)_\w+", text)}
    series = {name for metric in METRICS for name in metric.series}
    assert asked - series == TRITONS_OWN
    assert all(asked & set(metric.series) for metric in METRICS)
    labels = {label for text in expressions(dashboard) for label in re.findall(r"by \((\w+)\)", text)}
    assert labels == {"le", *(metric.label for metric in METRICS if metric.label)}

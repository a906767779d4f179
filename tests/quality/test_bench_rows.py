"""Rows as tables: every column always, and each explained where a reader looks for it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

from adacorr_deploy.quality.bench_rows import COLUMNS, BenchRow, SetScores, cells_of_row
from adacorr_deploy.quality.metrics import BootstrapInterval

INTERVAL = BootstrapInterval(value=1.0, low=0.5, high=1.5)
SETS = SetScores(
    samples=100,
    frechet=INTERVAL,
    frechet_ratio=None,
    frechet_uncached=INTERVAL,
    precision=INTERVAL,
    recall=INTERVAL,
    precision_real=None,
    recall_real=None,
)
ROW = BenchRow(policy="fora", steps=50, speedup=2.0, psnr_db=math.inf, sets=SETS)


def test_a_row_has_every_column_and_nothing_that_json_lacks() -> None:
    for row in (ROW, replace(ROW, sets=None), BenchRow(policy="failed", steps=1, error="no")):
        cells = cells_of_row(row)
        assert tuple(cells) == COLUMNS
        assert json.loads(json.dumps(cells, allow_nan=False)) == cells
    cells = cells_of_row(ROW)
    assert (cells["psnr_db"], cells["ssim"], cells["baseline"]) == (None, None, None)
    assert (cells["frechet"], cells["frechet_low"], cells["frechet_high"]) == (1.0, 0.5, 1.5)
    assert (cells["frechet_ratio"], cells["samples"]) == (None, 100)


def test_the_documentation_explains_every_column_and_no_other(repository_root: Path) -> None:
    text = (repository_root / "adacorr_deploy" / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = re.search(r"\| column \|.*?\n\n", text, re.DOTALL)
    assert table is not None
    explained = {name for line in table[0].strip().splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert explained == {name for name in COLUMNS if not name.endswith(("_low", "_high"))}

"""Record what published caching code decides, for tests that compare our gates with it.

    git clone https://github.com/ali-vilab/TeaCache
    python tools/references/record.py teacache TeaCache -o tests/caching/references

Runs the decision code of the clone's HEAD on small random signals, and writes signals, settings and decisions to
NAME.json, with the repository, commit, file and definition that made them. Nothing of that code is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import adacache
import easycache
import fastcache
import lazydit
import learning_to_cache
import smoothcache
import teacache
from checkout import Checkout

RECORDERS: Final[Mapping[str, ModuleType]] = {
    module.__name__: module
    for module in (adacache, easycache, fastcache, lazydit, learning_to_cache, smoothcache, teacache)
}


def recorded(name: str, checkout: Checkout) -> dict[str, Any]:
    """Return a fixture: where it is from, how it was made, and a list of runs."""
    recorder = RECORDERS[name]
    source = {
        "repository": recorder.REPOSITORY,
        "commit": checkout.commit,
        "file": recorder.FILE,
        "definitions": recorder.DEFINITIONS,
        "licence": licence(checkout),
    }
    return {"source": source, "recorded": recorder.HOW, "runs": recorder.record(checkout)}


def rounded(value: Any) -> Any:  # noqa: ANN401  JSON
    """Keep seven digits of every number, as many as a float32 has."""
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def licence(checkout: Checkout) -> str:
    """Return the first line of the clone's licence file, or that there is none."""
    for file in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if file in checkout.files():
            return next(line.strip() for line in checkout.source(file).splitlines() if line.strip())
    return "no licence file"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(RECORDERS))
    parser.add_argument("clone", type=Path, help="clone of the method's repository, bare or not")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the fixtures")
    args = parser.parse_args()
    document = recorded(args.name, Checkout.at(args.clone))
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.name}.json"
    head, runs = {key: document[key] for key in ("source", "recorded")}, document["runs"]
    lines = ",\n".join(f"  {json.dumps(rounded(run), allow_nan=False)}" for run in runs)  # a line a run
    text = json.dumps(head, indent=1, ensure_ascii=False)[:-2] + f',\n "runs": [\n{lines}\n ]\n}}\n'
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(runs)} runs", file=sys.stderr)


if __name__ == "__main__":
    main()

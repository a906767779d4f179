"""The table of policies: every caching method as a gate, spans, a predictor, guards and, on top, AdaCorrection.

A policy is named (`teacache`), named with its knob (`teacache@0.3`), made of a file of one's own, and any of them may
have AdaCorrection on top (`teacache@0.3+adacorrection@2`, `teacache+paper-lazy`). A file is JSON or TOML with the
fields of `Policy`, and is untrusted: unknown keys and values out of range are refused with the field's name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from adacorr_deploy.caching.decisions import Placement
from adacorr_deploy.caching.gates.accumulated import EasyCacheGate, MagCacheGate, TeaCacheGate
from adacorr_deploy.caching.gates.adacorrection import (
    AdaCorrectionGate,
    Correction,
    Corrector,
    Mode,
    PaperCorrection,
    PaperGate,
)
from adacorr_deploy.caching.gates.codebook import AdaCacheGate
from adacorr_deploy.caching.gates.error_tables import BlockCachingGate, SmoothCacheGate
from adacorr_deploy.caching.gates.rule import GateSettings
from adacorr_deploy.caching.gates.steps import (
    FewerStepsGate,
    IntervalGate,
    MaskGate,
    NoGate,
    RouterGate,
    ScheduleGate,
)
from adacorr_deploy.caching.gates.thresholds import FastCacheGate, FirstBlocksGate, LazyGate, PruneGate
from adacorr_deploy.caching.granularity import Granularity, Spans
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.policy_model import Policy
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.core.errors import PolicyError
from adacorr_deploy.core.untrusted import bounded_file, clipped, first_fault, value_from_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "DEFAULT_POLICY",
    "FILE_PRESETS",
    "ON_TOP",
    "PAPERS",
    "PRESETS",
    "UNCALIBRATED",
    "AdaCorrectionGate",
    "Corrector",
    "FewerStepsGate",
    "IntervalGate",
    "NoGate",
    "PaperGate",
    "Policy",
    "ScheduleGate",
    "named_file",
    "policy_from_file",
    "policy_named",
    "word_for_commands",
]

_MAX_FILE_BYTES: Final = 16 << 10  # tomllib takes seconds for more: its time grows with the square of a key's dots
_MAX_MASK_BYTES: Final = 4 << 20  # of a mask or router in JSON: 1000 steps of 112 halves
ON_TOP: Final[Mapping[str, Mode | None]] = {  # the word after the base's name and a plus; None: revision alone
    "adacorrection": Mode.ROBUST,
    "paper-lazy": Mode.PAPER_LAZY,
    "paper-exact": Mode.PAPER_EXACT,
    "revised": None,
}

_HOLD: Final = Predictor(kind=PredictorKind.HOLD)
_GATED: Final = Predictor(kind=PredictorKind.GATED)
_OUTPUT: Final = Predictor(kind=PredictorKind.OUTPUT_TAYLOR, revision=Revision.QUADRATIC)
_RESIDUAL: Final = Predictor(kind=PredictorKind.RESIDUAL)
_TAYLOR_SEER: Final = Predictor(kind=PredictorKind.RESIDUAL_TAYLOR)
_TAYLOR_SEER_2: Final = Predictor(kind=PredictorKind.RESIDUAL_TAYLOR, order=2)
_AFFINE: Final = Predictor(kind=PredictorKind.AFFINE)

_PARTS: Final = Spans(granularity=Granularity.PARTS)


def _published(*, warmup_steps: int = 1, final_steps: int = 0, max_age_steps: int = 1000) -> Guards:
    """Return guards that leave the age to the method, as its publication does, unless one is given."""
    return Guards(warmup_steps=warmup_steps, final_steps=final_steps, max_age_steps=max_age_steps)


def _range(*, first: int = 0, last: int = 0) -> Spans:
    return Spans(granularity=Granularity.RANGE, first=first, last=last)


PRESETS: Final[Mapping[str, Policy]] = {
    policy.name: policy
    for policy in (
        Policy(name="none", gate=NoGate()),
        Policy(name="fewer-steps", gate=FewerStepsGate()),
        Policy(
            name="fora",
            gate=IntervalGate(),
            predictor=_GATED,
            guards=Guards(max_age_steps=1000),  # the interval alone decides, as published
        ),
        Policy(
            name="deepcache",
            gate=IntervalGate(),
            spans=_range(first=1, last=1),
            predictor=_RESIDUAL,
            guards=_published(),
        ),
        Policy(
            name="smoothcache",
            gate=SmoothCacheGate(),
            predictor=_GATED,
            guards=_published(final_steps=1),
        ),
        Policy(name="block-caching", gate=BlockCachingGate(), spans=_PARTS, predictor=_AFFINE, guards=_published()),
        Policy(name="lazydit", gate=LazyGate(), predictor=_GATED, guards=_published()),
        Policy(name="lazydit-guarded", gate=LazyGate(), predictor=_GATED, guards=_published(max_age_steps=1)),
        Policy(name="fastcache", gate=FastCacheGate(scale=0.05), spans=_PARTS, predictor=_AFFINE, guards=_published()),
        Policy(
            name="fastcache-guarded",
            gate=FastCacheGate(scale=0.05),
            spans=_PARTS,
            predictor=_AFFINE,
            guards=_published(max_age_steps=1),
        ),
        Policy(name="teacache", gate=TeaCacheGate(), predictor=_RESIDUAL, guards=_published(final_steps=1)),
        Policy(name="adacache", gate=AdaCacheGate(), predictor=_RESIDUAL, guards=_published(final_steps=2)),
        Policy(name="fbcache", gate=FirstBlocksGate(), spans=_range(first=1), predictor=_RESIDUAL, guards=_published()),
        Policy(
            name="dbcache",
            gate=FirstBlocksGate(),
            spans=_range(first=8),
            predictor=_RESIDUAL,
            guards=_published(warmup_steps=8),
        ),
        Policy(
            name="dbprune",
            gate=PruneGate(),
            spans=Spans(granularity=Granularity.PARTS, first=8),
            predictor=_RESIDUAL,
            guards=_published(warmup_steps=8),
        ),
        Policy(name="magcache", gate=MagCacheGate(), predictor=_RESIDUAL, guards=_published()),
        Policy(
            name="easycache",
            gate=EasyCacheGate(),
            predictor=_RESIDUAL,
            guards=_published(warmup_steps=10, final_steps=1),
        ),
        Policy(
            name="taylorseer",
            gate=IntervalGate(interval=5, offset=4),
            predictor=_TAYLOR_SEER,
            guards=_published(warmup_steps=3),
        ),
        Policy(
            name="taylorseer-2",
            gate=IntervalGate(interval=5, offset=4),
            predictor=_TAYLOR_SEER_2,
            guards=_published(warmup_steps=3),
        ),
        Policy(name="scheduled", gate=ScheduleGate(), predictor=_OUTPUT),
        Policy(name="scheduled-blocks", gate=ScheduleGate()),
        Policy(name="robust", gate=AdaCorrectionGate(), predictor=_OUTPUT),
        Policy(name="robust-lag", gate=AdaCorrectionGate(), predictor=_OUTPUT, decide=Placement.LAG),
        Policy(name="robust-blocks", gate=AdaCorrectionGate()),
        Policy(name="paper-exact", gate=PaperGate(), predictor=_HOLD, guards=Guards(warmup_steps=1, final_steps=0)),
        Policy(name="paper-lazy", gate=PaperGate(lazy=True), predictor=_HOLD),
    )
}
PAPERS: Final[Mapping[str, str]] = {  # of presets whose gate alone does not tell the method
    "fora": "2407.01425",
    "deepcache": "2312.00858",
    "taylorseer": "2503.06923",
    "taylorseer-2": "2503.06923",
}
FILE_PRESETS: Final[Mapping[str, type[MaskGate] | type[RouterGate]]] = {"static-mask": MaskGate, "l2c": RouterGate}
DEFAULT_POLICY: Final = "robust"
UNCALIBRATED: Final = ", ".join(
    policy.name for policy in PRESETS.values() if not policy.needs_calibration and not policy.quantities
)


def policy_named(name_or_file: str) -> Policy:
    """Return a preset, one with its knob turned, the policy of a file, or one of these with AdaCorrection on top.

    Args:
        name_or_file: `robust@2.5`, `fora@2`, `l2c@router.json`, `mine.toml`, `teacache@0.3+adacorrection@2`,
            `fora+paper-lazy`, `fbcache+revised`.

    Raises:
        PolicyError: If there is no such preset or file, or a field is not valid.
    """
    base, plus, on_top = name_or_file.rpartition("+")
    word, at, target = on_top.partition("@")
    if plus and word in ON_TOP:
        return _corrected(_base_named(base), word, at + target)
    return _base_named(name_or_file)


def named_file(name_or_file: str) -> Path:
    """Return the file that a policy's name would be read from, `router.json` of `l2c@router.json` among them.

    A preset's own name comes back as a path, at which nothing need stand.
    """
    base, plus, on_top = name_or_file.rpartition("+")
    given = base if plus and on_top.partition("@")[0] in ON_TOP else name_or_file
    name, at, file = given.partition("@")
    return Path(file if at and name in FILE_PRESETS else given)


def word_for_commands(policy: str) -> str:
    """Return what a command takes for a policy of this name: of a file's, which only its user knows, FILE."""
    base, plus, on_top = policy.rpartition("+")
    if plus and on_top.partition("@")[0] in ON_TOP:
        return f"{word_for_commands(base)}+{on_top}"
    preset, _, _ = policy.partition("@")
    if preset in PRESETS:
        return policy
    return f"{preset}@FILE" if preset in FILE_PRESETS else "FILE"


def _base_named(name_or_file: str) -> Policy:
    name, at, knob = name_or_file.partition("@")
    if name in PRESETS:
        return _with_knob(PRESETS[name], knob) if at else PRESETS[name]
    if name in FILE_PRESETS:
        return _with_mask(name, knob)
    path = Path(name_or_file)
    if path.suffix in (".json", ".toml"):
        return policy_from_file(path)
    known = ", ".join([*PRESETS, *(f"{name}@FILE" for name in FILE_PRESETS)])
    raise PolicyError(f"policy {clipped(name_or_file)} is neither a preset ({known}) nor a .json or .toml file.")


def policy_from_file(path: Path) -> Policy:
    """Read and validate a policy file.

    Raises:
        PolicyError: If it can't be read or parsed, is larger than 16 KiB, or a field is not valid.
    """
    return _validated(_content(path, _MAX_FILE_BYTES), where=f"policy file {path}")


def _content(path: Path, limit_bytes: int) -> object:
    try:
        text = bounded_file(path, limit_bytes=limit_bytes).decode("utf-8")
        return tomllib.loads(text) if path.suffix == ".toml" else value_from_json(text)
    except OSError as error:
        raise PolicyError(f"policy file {path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise PolicyError(f"policy file {path} can't be read: {error}") from error
    except RecursionError as error:
        raise PolicyError(f"policy file {path} can't be read: it is nested too deeply") from error


def _with_knob(policy: Policy, value: str) -> Policy:
    if not policy.gate.knob:
        raise PolicyError(f"policy {policy.name} has no target: leave out {clipped('@' + value)}")
    raw = policy.model_dump(mode="json", by_alias=True)
    raw["name"] = f"{policy.name}@{value}"
    raw["gate"][policy.gate.knob] = value
    return _validated(raw, where=_where(raw["name"], policy.gate))


def _with_mask(name: str, file: str) -> Policy:
    """Return a policy whose gate is in a file of its own."""
    gate, path = FILE_PRESETS[name], Path(file)
    if path.suffix != ".json":
        raise PolicyError(f"policy {name} needs {gate.knob_meaning}. Give it as {name}@FILE.json; got {clipped(file)}.")
    content = _content(path, _MAX_MASK_BYTES)
    if not isinstance(content, dict):
        raise PolicyError(f"policy file {path}: allowed is {gate.knob_meaning}")
    raw = {
        "name": f"{name}@{path.name}"[:80],
        "gate": {**content, "kind": gate.model_fields["kind"].default},
        "predictor": _GATED.model_dump(mode="json"),
        "guards": _published().model_dump(mode="json"),
    }
    return _validated(raw, where=f"policy file {path}")


def _corrected(base: Policy, word: str, target: str) -> Policy:
    """Return a policy with AdaCorrection on top, as the word says it; `target` is empty, or `@` and a speed-up."""
    raw = base.model_dump(mode="json", by_alias=True)
    raw["name"], mode = f"{base.name}+{word}{target}", ON_TOP[word]
    settings = Correction if mode is Mode.ROBUST else PaperCorrection
    if target and (mode is None or not settings.knob):
        raise PolicyError(f"policy {base.name}+{word} has no target: leave out {clipped(target)}")
    if mode is None and not base.caches:
        raise PolicyError(f"policy {base.name}+{word}: {base.name} skips no steps that could be revised.")
    if mode is None or (mode is Mode.ROBUST and base.division.granularity is Granularity.RANGE):
        raw["predictor"]["revision"] = (Revision.LINEAR if base.revision is Revision.NONE else base.revision).value
    if mode is not None:
        raw["correction"] = {"mode": mode.value, **({settings.knob: target[1:]} if target else {})}
    return _validated(raw, where=_where(raw["name"], settings))


def _where(name: str, gate: GateSettings | type[GateSettings]) -> str:
    return f"policy {clipped(name)[1:-1]}" + (f" (after @ stands {gate.knob_meaning})" if gate.knob else "")


def _validated(raw: object, *, where: str) -> Policy:
    try:
        return Policy.model_validate(raw)
    except ValidationError as error:
        raise PolicyError(f"{where}: {first_fault(error)}") from error

"""From a policy to the controller of one request."""

from __future__ import annotations

from adacorr_deploy.caching.adacorrection_controller import AdaCorrectionController
from adacorr_deploy.caching.calibration import Calibration
from adacorr_deploy.caching.correction import OnTop
from adacorr_deploy.caching.decisions import Controller
from adacorr_deploy.caching.gate_controller import GateController, ProposalCorrection
from adacorr_deploy.caching.gates.adacorrection import (
    AdaCorrectionGate,
    Correction,
    Corrector,
    PaperCorrection,
    PaperGate,
)
from adacorr_deploy.caching.gates.steps import StepsRule
from adacorr_deploy.caching.lookups import RequestLookups
from adacorr_deploy.caching.paper_controller import PaperController
from adacorr_deploy.caching.paper_correction import PaperOnTop
from adacorr_deploy.caching.policy_model import Policy
from adacorr_deploy.caching.profile import Profile, Quantity
from adacorr_deploy.caching.run import Run
from adacorr_deploy.core.errors import PolicyError

__all__ = [
    "AdaCorrectionController",
    "GateController",
    "PaperController",
    "Run",
    "StaticController",
    "controller_for_policy",
    "quantities_needed",
]


class StaticController(GateController):
    """Evaluates the blocks of given steps and reuses the others."""

    def __init__(self, policy: Policy, run: Run, evaluated: frozenset[int], reason: str) -> None:
        super().__init__(policy, run, policy.spans_of(run), StepsRule(evaluated, reason))


def quantities_needed(policy: Policy) -> frozenset[Quantity]:
    """Return what a policy looks up in a profile."""
    return frozenset(Quantity(name) for name in policy.quantities)


def controller_for_policy(
    policy: Policy, run: Run, calibration: Calibration | None, profile: Profile | None = None
) -> Controller:
    """Return a fresh controller for one request.

    Args:
        policy: Its predictor must be the calibration's where it is calibrated.
        run: The request.
        calibration: Needed where `policy.needs_calibration`.
        profile: Needed where `quantities_needed` are any, and holds them.

    Raises:
        CalibrationError: If the calibration or the profile is missing, or the calibration is for another predictor.
        PolicyError: If the policy is for other bundles or runs than this one.
    """
    spans = policy.spans_of(run)
    lookups = RequestLookups(settings=policy, run=run, spans=spans, made=calibration, profile=profile)
    match policy.gate:
        case PaperGate() as gate:
            return PaperController(policy, gate, run, spans, lookups.paper_floors if gate.lazy else None)
        case AdaCorrectionGate() as gate:
            return AdaCorrectionController(policy, gate, run, spans, lookups.calibration)
        case gate:
            return GateController(policy, run, spans, gate.rule(lookups), _on_top(lookups), lookups.affines())


def _on_top(lookups: RequestLookups) -> ProposalCorrection | None:
    policy, run, spans = lookups.settings, lookups.run, lookups.spans
    match policy.correction:
        case None:
            return None
        case PaperCorrection() as equations:
            return PaperOnTop(equations, spans, lookups.paper_floors if equations.is_lazy else None)
        case settings:
            _check_halves(policy.name, settings, run)
            return OnTop(settings, policy.guards, run, spans, lookups.calibration)


def _check_halves(policy: str, correction: Correction, run: Run) -> None:
    if correction.corrector is Corrector.CHEAP and not run.halves:
        raise PolicyError(
            f"policy {policy}: correction.corrector is cheap, which evaluates the MLP half of a block alone, and the "
            "bundle's parts are whole blocks. Rebuild it with adacorr-build --halves, or take corrector defer."
        )

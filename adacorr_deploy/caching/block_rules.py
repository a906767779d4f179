"""The paper's decision as numbers: what a GPU needs to take it by itself, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adacorr_deploy.caching.gates.adacorrection import PaperGate
from adacorr_deploy.caching.policy_model import Policy
from adacorr_deploy.core.errors import PolicyError


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRule:
    """How one block is decided by the paper's score: `PaperGate` and `Guards` without their classes.

    Attributes:
        lambda_: λ of S = Δ_temp² + λ·Δ_spatial.
        gamma: γ of w = clip(γ·(S − floor), 0, 1).
        epsilon: A lazy block is reused where w is at most this.
        floor: What is subtracted from S.
        lazy: Whether a block may be reused at all; without it, it is evaluated and blended at every step.
        warmup_steps: First steps of a run that are evaluated.
        final_steps: Last steps of a run that are evaluated.
        max_age_steps: Steps after an evaluation in which it may stand for the block.
        protected: Whether the block is evaluated at every step.
    """

    lambda_: float
    gamma: float
    epsilon: float
    floor: float
    lazy: bool
    warmup_steps: int
    final_steps: int
    max_age_steps: int
    protected: bool

    @property
    def thresholds(self) -> tuple[float, float, float]:
        """τ_reuse, τ_recompute and γ: of the weight, and of the blend that a correction ends with."""
        return self.floor, self.floor + 1.0, self.gamma


def block_rules(policy: Policy, floors: Sequence[float] | None, blocks: int) -> tuple[BlockRule, ...]:
    """Return the rule of each block part.

    Args:
        policy: One that decides on the device.
        floors: Calibrated, of each block part; None for a gate that is not lazy.
        blocks: Number of block parts.

    Raises:
        PolicyError: If the policy has no such rule.
    """
    gate, guards = policy.gate, policy.guards
    if not isinstance(gate, PaperGate):
        raise PolicyError(f"policy {policy.name}: gate {gate.kind} can't decide on the device. Take a paper gate.")
    return tuple(
        BlockRule(
            lambda_=gate.lambda_,
            gamma=gate.gamma,
            epsilon=gate.epsilon,
            floor=floors[block] if floors is not None else 0.0,
            lazy=gate.lazy,
            warmup_steps=guards.warmup_steps,
            final_steps=guards.final_steps,
            max_age_steps=guards.max_age_steps,
            protected=block in guards.protected_blocks,
        )
        for block in range(blocks)
    )

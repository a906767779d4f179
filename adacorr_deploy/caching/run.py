"""What a controller must know of a request and its bundle."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One request on one bundle.

    Attributes:
        steps: Steps that the sampler takes, S.
        blocks: Block parts of the bundle, L.
        halves: Whether the parts are halves of transformer blocks: attention, MLP, attention, …
        elements: Numbers that enter a block for one image: N·D. FastCache's test needs it.
        lags: Whether the controller decides with what an earlier step measured.
    """

    steps: int
    blocks: int
    halves: bool = False
    elements: int = 1
    lags: bool = False

    @property
    def parts_per_block(self) -> int:
        """Block parts that make up what a policy counts as one block: 2 of halves; a segment counts as one."""
        return 2 if self.halves else 1

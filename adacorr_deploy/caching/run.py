"""What a controller must know of a request and its bundle."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One request on one bundle.

    Attributes:
        steps: Steps that the sampler takes, S.
        blocks: Block parts of the bundle, L.
        halves: Of a bundle whose parts are single units: the names of each transformer block's units, (("attention",
            "mlp"), …) of a DiT. Empty where parts are whole blocks, or segments.
        elements: Numbers that enter a block for one image: N·D. FastCache's test needs it.
        frames: Of a clip's latents, F; 1 of images.
        lags: Whether the controller decides with what an earlier step measured.
    """

    steps: int
    blocks: int
    halves: tuple[tuple[str, ...], ...] = ()
    elements: int = 1
    frames: int = 1
    lags: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each block part is, of single units; empty where parts are whole blocks."""
        return tuple(unit for block in self.halves for unit in block)

    @property
    def whole_blocks(self) -> int:
        """What a policy counts as blocks: transformer blocks, of single units too; a segment counts as one."""
        return len(self.halves) or self.blocks

    def parts_of_blocks(self, first: int, stop: int) -> int:
        """Return how many block parts make up the blocks `first` … `stop` − 1 of those."""
        if not self.halves:
            return max(0, min(stop, self.blocks) - first)
        return sum(len(block) for block in self.halves[first:stop])

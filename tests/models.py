"""Specs of class-conditional models of any size, for tests that need no weights."""

from __future__ import annotations

from adacorr_deploy.core.latents import LatentSpec
from adacorr_deploy.core.specs import ConditionSpec, DType, ModelSpec

BLOCK = ("attention", "mlp")


def model_spec(
    *,
    latent_shape: tuple[int, int, int] | tuple[int, int, int, int] = (1, 4, 4),
    patch: tuple[int, int] | tuple[int, int, int] = (2, 2),
    width: int = 8,
    units: tuple[int, ...] = (2,),
    precision: DType = DType.FLOAT32,
    num_classes: int = 10,
    learned_variance: bool = False,
) -> ModelSpec:
    """Return the spec of a model whose blocks are an attention and an MLP, or, of other `units`, one for each part."""
    whole = all(count % len(BLOCK) == 0 for count in units) or set(units) == {1}
    parts_as_blocks = tuple(tuple(f"unit{unit}" for unit in range(count)) for count in units)
    pairs, odd = divmod(sum(units), len(BLOCK))
    return ModelSpec(
        family="dit",
        precision=precision,
        latents=LatentSpec(shape=latent_shape, patch=patch),
        width=width,
        conditions=ConditionSpec(num_classes=num_classes),
        blocks=(BLOCK,) * pairs if whole and not odd else parts_as_blocks,
        units=units,
        learned_variance=learned_variance,
    )

"""How a stored weight comes from the model's own: as it is, transposed, or joined from several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRecipe:
    """A stored weight: its name, and how it is computed from the part's weights by name."""

    name: str
    compute: Callable[[Mapping[str, Tensor]], Tensor]


def original_weight(name: str) -> WeightRecipe:
    return WeightRecipe(name=name, compute=lambda weights: weights[name])


def transposed(recipe: WeightRecipe, permutation: tuple[int, ...]) -> WeightRecipe:
    order = "" if permutation == (1, 0) else f"({','.join(map(str, permutation))})"
    return WeightRecipe(
        name=f"{recipe.name}.T{order}", compute=lambda weights: recipe.compute(weights).permute(permutation)
    )


def joined(recipes: tuple[WeightRecipe, ...], axis: int) -> WeightRecipe:
    names = "+".join(recipe.name for recipe in recipes)
    suffix = f".{axis}" if axis else ""
    return WeightRecipe(
        name=f"({names}){suffix}",
        compute=lambda weights: torch.cat([recipe.compute(weights) for recipe in recipes], dim=axis),
    )

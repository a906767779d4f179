"""Graph pass: what only rearranges weights leaves the graph, so that no runtime does it again at every load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import onnx_ir as ir

from adacorr_deploy.exporters.weight_recipe import WeightRecipe, joined, original_weight, transposed

_Fold = Callable[[ir.Node, Sequence[WeightRecipe]], WeightRecipe]

_FOLDS: Final[Mapping[str, _Fold]] = {
    "Transpose": lambda node, recipes: transposed(recipes[0], tuple(node.attributes["perm"].as_ints())),
    "Concat": lambda node, recipes: joined(tuple(recipes), node.attributes["axis"].as_int()),
}


class FoldWeightLayoutPass(ir.passes.InPlacePass):
    """Replace Transpose and Concat of weights by graph inputs that hold the result; `recipes` says how to make it.

    Args:
        weights: Names of the graph inputs that are weights.
    """

    def __init__(self, weights: Sequence[str]) -> None:
        super().__init__()
        self._weights = frozenset(weights)
        self.recipes: dict[str, WeightRecipe] = {}  # by the name of the graph input, after the pass

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        derived = {value: original_weight(value.name) for value in graph.inputs if value.name in self._weights}
        inputs = [value for value in graph.inputs if value not in derived]
        folded = []
        for node in graph:
            fold = _FOLDS.get(node.op_type) if node.domain == "" else None
            recipes = [derived[value] for value in node.inputs if value in derived]
            if fold is not None and recipes and len(recipes) == len(node.inputs):
                derived[node.outputs[0]] = fold(node, recipes)
                folded.append(node)
        stored: dict[str, ir.Value] = {}
        for value, recipe in derived.items():
            if all(user in folded for user in value.consumers()):
                continue
            if recipe.name not in stored:
                stored[recipe.name] = ir.Value(name=recipe.name, shape=value.shape, type=value.type)
                self.recipes[recipe.name] = recipe
            for user, index in tuple(value.uses()):
                if user not in folded:
                    user.replace_input_with(index, stored[recipe.name])
        graph.remove(reversed(folded), safe=True)
        graph.inputs[:] = [*inputs, *stored.values()]
        return ir.passes.PassResult(model, modified=bool(folded))

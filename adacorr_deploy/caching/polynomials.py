"""The coefficients of polynomials through evaluations: of a step's estimate, linear in what the evaluations gave."""

from __future__ import annotations

import math
from collections.abc import Sequence


def polynomial_coefficients(step: int, evaluations: Sequence[int]) -> tuple[float, ...]:
    """Return Lagrange's coefficients at `step` of the polynomial through `evaluations`; they sum to 1."""
    coefficients = []
    for node in evaluations:
        product = 1.0
        for other in evaluations:
            if other != node:
                product *= (step - other) / (node - other)
        coefficients.append(product)
    return tuple(coefficients)


def difference_coefficients(step: int, evaluations: Sequence[int]) -> tuple[float, ...]:
    """Return the coefficients of TaylorSeer's estimate at `step`, newest evaluation first; they sum to 1.

    dᵢ at an evaluation is the difference of dᵢ₋₁ there and at the evaluation before, over the steps between the two. Up
    to order 1 this is the polynomial through the evaluations; order 2 is not: its last term lacks Newton's product.
    """
    derivatives: list[list[float]] = []  # of the evaluation at hand, by order; each a row of coefficients
    for index in range(len(evaluations) - 1, -1, -1):
        fresh = [[float(other == index) for other in range(len(evaluations))]]
        for before in derivatives:
            apart = evaluations[index] - evaluations[index + 1]
            fresh.append([(now - then) / apart for now, then in zip(fresh[-1], before, strict=True)])
        derivatives = fresh
    ahead = step - evaluations[0]
    factors = [ahead**order / math.factorial(order) for order in range(len(derivatives))]
    return tuple(
        sum(factor * row[index] for factor, row in zip(factors, derivatives, strict=True))
        for index in range(len(evaluations))
    )

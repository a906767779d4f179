"""A small profile with round numbers, for tests of what policies decide on it."""

from __future__ import annotations

import math

from adacorr_deploy.caching.calibration import CalibrationKey
from adacorr_deploy.caching.profile import AffineMap, ChangePolynomial, LinearGate, Profile

WIDTH = 3


def profile(*, steps: int, parts: int = 2, width: int = WIDTH) -> Profile:
    """TeaCache's polynomial is x; MagCache's ratios 0.97; errors 0.1 per step of age; maps are scale 2, shift 1."""
    table = tuple(tuple(0.1 * age if age <= step else math.inf for age in (1, 2, 3)) for step in range(steps))
    return Profile(
        key=CalibrationKey(
            checkpoint_sha256="0" * 64, sampler="ddim", steps=steps, guidance=4.0, latent_shape=(1, 4, 4)
        ),
        images=4,
        output_change=ChangePolynomial(coefficients=(0.0, 0.0, 0.0, 1.0, 0.0), low=0.0, high=10.0),
        magnitude_ratios=(1.0, *(0.97,) * (steps - 1)),
        unit_errors={"attention": table, "mlp": tuple(tuple(2 * error for error in row) for row in table)},
        part_errors=tuple(tuple(tuple(error * (1 + part) for error in row) for row in table) for part in range(parts)),
        affine=tuple(
            AffineMap(first=part, stop=part + 1, scale=(2.0,) * width, shift=(1.0,) * width) for part in range(parts)
        ),
        gates=tuple(LinearGate(weights=(1.0,) * width, bias=0.5) for _ in range(parts)),
    )

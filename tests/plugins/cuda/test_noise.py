"""The noise kernel, run on the CPU from its own source, against the NumPy oracle."""

from __future__ import annotations

import numpy as np
import pytest

from adacorr_deploy.plugins import oracle
from adacorr_deploy.plugins.kernels import NOISE_KERNEL
from tests.plugins.host_kernels import FLOAT32, Array, needs_compiler, run_kernel_over

pytestmark = needs_compiler


def philox_normal(keys: list[tuple[int, int]], draw: int, image: tuple[int, ...], seed: int = 0) -> Array:
    inputs = {"keys": np.array(keys, np.uint64).view(np.int64), "draw": np.array([draw], np.int64)}
    outputs = {"noise": ((len(keys), *image), FLOAT32)}
    return run_kernel_over(NOISE_KERNEL, "float32", inputs, outputs, seed=seed)["noise"]


@pytest.mark.parametrize("image", [(1, 1, 1), (1, 3, 3), (4, 32, 32)])
@pytest.mark.parametrize("draw", [0, 1, 250])
def test_noise_is_the_oracle_s_wherever_it_is_made(image: tuple[int, ...], draw: int) -> None:
    keys = [(0, 0), (7, 1), (2**64 - 1, 2**40)]
    expected = [oracle.philox_normals(seed, number, draw, int(np.prod(image))).reshape(image) for seed, number in keys]
    for order in (0, 1, 2):
        found = philox_normal(keys, draw, image, order)
        np.testing.assert_allclose(found, np.stack(expected), rtol=2.0**-22, atol=1e-9)
    alone = philox_normal(keys[1:2], draw, image)
    np.testing.assert_array_equal(alone[0], found[1], err_msg="an image's noise must not depend on its neighbours")

"""What a model's latents may be decides the named axes of its parts, and what its engines are compiled for."""

from __future__ import annotations

import pytest

from adacorr_deploy.core.engine_build import Profile
from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.latents import LatentSpec

FIXED = LatentSpec(shape=(4, 8, 8), patch=(2, 2))
WIDE = LatentSpec(shape=(4, 8, 8), patch=(2, 2), smallest=(8, 4), largest=(8, 32))
CLIP = LatentSpec(shape=(4, 6, 8, 8), patch=(1, 2, 2), largest=(12, 16, 16))


def test_only_axes_that_vary_are_named() -> None:
    assert (FIXED.dims, FIXED.tokens_dim, FIXED.varying) == ((4, 8, 8), 16, ())
    assert (WIDE.dims, WIDE.tokens_dim) == ((4, 8, "width"), "tokens")
    assert (CLIP.dims, CLIP.varying) == ((4, "frames", "height", "width"), ("frames", "height", "width"))
    assert CLIP.sizes_at((3, 4, 6)) == {"frames": 3, "height": 4, "width": 6, "tokens": 18}
    assert CLIP.tokens_at(None) == 96


def test_engines_are_compiled_for_what_varies_or_for_the_default() -> None:
    assert Profile(sizes={"width": (4, 8, 16)}).for_latents(WIDE).axes()["tokens"] == (8, 16, 32)
    assert Profile().for_latents(WIDE).sizes == {"width": (8, 8, 8), "tokens": (16, 16, 16)}
    assert Profile().for_latents(FIXED).sizes == {}
    profile = Profile(sizes={"width": (4, 8, 16)}).for_latents(WIDE)
    profile.check(batch=1, steps=1, sizes=WIDE.sizes_at((8, 16)))
    with pytest.raises(RequestError, match=r"width 18 is outside .*, 4 … 16.*adacorr-build --width"):
        profile.check(batch=1, steps=1, sizes={"width": 18})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": (4, 8, 64)}, r"--width is 4,8,64, this model's latents take 4 … 32 in multiples of 2"),
        ({"width": (5, 8, 16)}, r"--width is 5,8,16"),
        ({"height": (4, 8, 8)}, r"--height is 4,8,8, this model's latents take 8 alone"),
        ({"frames": (1, 2, 3)}, r"--frames is given, and this model's latents have none"),
    ],
)
def test_sizes_that_no_request_can_have_are_refused(sizes: dict[str, tuple[int, int, int]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Profile(sizes=sizes).for_latents(WIDE)


@pytest.mark.parametrize(
    "fields",
    [
        {"patch": (3, 3)},
        {"patch": (1, 2, 2)},
        {"largest": (8, 9)},
        {"largest": (6, 8)},
        {"smallest": (2, 2)},
        {"largest": (8, 8), "smallest": (10, 2)},
        {"shape": (4, 0, 8)},
    ],
)
def test_sizes_that_do_not_go_together_are_refused(fields: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"allowed|other axes|without largest"):
        LatentSpec(**{"shape": (4, 8, 8), "patch": (2, 2), **fields})  # type: ignore[arg-type]

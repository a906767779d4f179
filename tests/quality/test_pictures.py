"""Pictures show every image at its place, whole, and are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adacorr_deploy.core.errors import OutputError, RequestError
from adacorr_deploy.quality import pictures
from adacorr_deploy.quality.pictures import (
    ImageGrid,
    difference_grid,
    picture_of_grids,
    write_picture,
)
from adacorr_deploy.runtime.images import png_from_picture
from tests.cli.full_disk import small_files_only

LEVELS = np.linspace(-1.0, 1.0, 6, dtype=np.float32)


def flat_grid(columns: int = 3, title: str = "") -> ImageGrid:
    """Six 4×5 images, each of one grey level."""
    return ImageGrid(
        title=title, images=np.broadcast_to(LEVELS[:, None, None, None], (6, 1, 4, 5)).copy(), columns=columns
    )


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def test_every_image_stands_in_its_row_and_column_with_square_pixels() -> None:
    drawn = pixels(picture_of_grids([flat_grid(columns=2)], scale=3))
    height, width, gap = 4 * 3, 5 * 3, pictures._GAP
    bottom, left = drawn.shape[0] - pictures._MARGIN, pictures._MARGIN
    top = bottom - (3 * height + 2 * gap)
    for index, level in enumerate(LEVELS):
        row, column = divmod(index, 2)
        y, x = top + row * (height + gap), left + column * (width + gap)
        assert (drawn[y : y + height, x : x + width] == round((float(level) + 1) * 127.5)).all(), index


def test_enlarging_invents_no_grey_levels() -> None:
    noise = np.where(np.random.default_rng(0).random((1, 1, 28, 28)) < 0.5, -1.0, 1.0).astype(np.float32)
    drawn = pixels(picture_of_grids([ImageGrid(title="", images=noise, columns=1)], scale=4))
    assert set(np.unique(drawn)) == {0, 255}


def test_values_outside_are_clipped_and_not_finite_ones_are_magenta() -> None:
    images = np.array([[[[-9.0, 9.0], [np.nan, np.inf]]]], np.float32)
    drawn = pixels(picture_of_grids([ImageGrid(title="", images=images, columns=1)], scale=1))
    corner = drawn[-2 - pictures._MARGIN : -pictures._MARGIN, pictures._MARGIN : pictures._MARGIN + 2]
    assert corner.tolist() == [[[0, 0, 0], [255, 255, 255]], [[255, 0, 255], [255, 0, 255]]]


def test_colour_images_keep_their_channels() -> None:
    red = np.array([1.0, -1.0, -1.0], np.float32).reshape(1, 3, 1, 1)
    drawn = pixels(picture_of_grids([ImageGrid(title="", images=red, columns=1)], scale=5))
    assert drawn[-1 - pictures._MARGIN, pictures._MARGIN].tolist() == [255, 0, 0]


def test_grids_titles_and_names_each_take_their_own_room() -> None:
    one = picture_of_grids([flat_grid()])
    two = picture_of_grids([flat_grid(), flat_grid()])
    named = picture_of_grids([flat_grid()], row_names=["upper", "lower"])
    titled = picture_of_grids([flat_grid()], title="A title")
    assert two.width > 2 * (one.width - 2 * pictures._MARGIN)
    assert named.width > one.width
    assert named.height == one.height
    assert titled.height > one.height
    assert picture_of_grids([flat_grid(title="a title much longer than its grid")]).width > one.width


def test_titles_use_only_letters_that_the_font_has() -> None:
    fancy = picture_of_grids([flat_grid(title="ρ ≥ 2.0×")])
    plain = picture_of_grids([flat_grid(title="rho >= 2.0x")])
    assert png_from_picture(fancy) == png_from_picture(plain)


def test_the_difference_is_black_where_equal_and_grows_with_the_gain() -> None:
    grid = flat_grid()
    nearer = ImageGrid(title="", images=grid.images + np.float32(0.25), columns=3)
    assert (difference_grid(grid, grid).images == -1.0).all()
    np.testing.assert_allclose(difference_grid(nearer, grid).images, -0.75, atol=1e-6)
    np.testing.assert_array_equal(difference_grid(nearer, grid).images, difference_grid(grid, nearer).images)
    amplified = difference_grid(nearer, grid, gain=4.0)
    np.testing.assert_allclose(amplified.images, 0.0, atol=1e-6)
    assert "4 times" in amplified.title


def test_the_same_picture_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / "new folder" / name, picture_of_grids([flat_grid(title="t")], row_names=["x", "y"]))
    first, second = ((tmp_path / "new folder" / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
    assert b"tEXt" not in first
    assert b"tIME" not in first


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "grid.png"
    write_picture(target, picture_of_grids([flat_grid()]))
    before = target.read_bytes()
    with small_files_only(len(before) // 2), pytest.raises(OutputError, match="File too large"):
        write_picture(target, picture_of_grids([flat_grid()], title="newer"))
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="can't be written"):
        write_picture(tmp_path / "file" / "grid.png", picture_of_grids([flat_grid()]))


BAD_CALLS = {
    "no channel axis": (
        lambda: ImageGrid(title="g", images=np.zeros((6, 4, 5), np.float32), columns=3),
        "(N, 1 or 3, H, W)",
    ),
    "latents": (lambda: ImageGrid(title="g", images=np.zeros((6, 4, 8, 8), np.float32), columns=3), "Decode latents"),
    "columns": (lambda: flat_grid(columns=4), "multiple of the columns"),
    "no grids": (lambda: picture_of_grids([]), "at least one grid"),
    "rows differ": (lambda: picture_of_grids([flat_grid(3), flat_grid(2)]), "can't stand side by side"),
    "names": (lambda: picture_of_grids([flat_grid()], row_names=["only one"]), "1 names for 2 rows"),
    "scale": (lambda: picture_of_grids([flat_grid()], scale=0), "at least 1"),
    "unlike": (lambda: difference_grid(flat_grid(3), flat_grid(2)), "must be alike"),
    "gain": (lambda: difference_grid(flat_grid(), flat_grid(), gain=0.0), "must be positive"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_refused_with_its_reason(case: str) -> None:
    call, message = BAD_CALLS[case]
    with pytest.raises(RequestError) as caught:
        call()
    assert message in str(caught.value)

"""A small random-weight instance of every family: one row of the table makes all tests of this folder run on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from adacorr_deploy.core.latents import LatentSize
from adacorr_deploy.exporters import ExportableModel, LoadedModel
from adacorr_deploy.exporters.dit_adapter import DiTModel
from adacorr_deploy.exporters.latte_adapter import LatteModel
from adacorr_deploy.exporters.stdit_adapter import STDiTModel
from tests.exporters.conftest import loaded_as, random_dit
from tests.exporters.random_latte import FRAMES, random_latte
from tests.exporters.random_pixart import ALPHA_1024, adapted, random_pixart
from tests.exporters.random_stdit import random_stdit
from tests.families.text_to_image import random_text_to_image


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An instance.

    Attributes:
        make: Returns the model: two or three blocks, every weight random, those that begin as zero drawn again.
        sizes: Of latents besides the default that are tested, where the model takes any: as unlike as may be.
    """

    make: Callable[[], ExportableModel]
    sizes: tuple[LatentSize, ...] = ()


FAMILIES: Final[Mapping[str, Family]] = {
    "dit": Family(make=lambda: DiTModel(random_dit())),
    "latte": Family(make=lambda: LatteModel(random_latte()), sizes=((FRAMES, 4, 6),)),
    "pixart": Family(make=lambda: adapted(random_pixart(ALPHA_1024)), sizes=((4, 12),)),
    "stdit": Family(make=lambda: STDiTModel(random_stdit(), default_size=(3, 4, 6)), sizes=((2, 6, 4), (1, 8, 8))),
    "text-to-image": Family(make=random_text_to_image, sizes=((4, 12),)),
}


def loaded_family(name: str) -> LoadedModel:
    """Return the instance as a loaded checkpoint."""
    return loaded_as(name, FAMILIES[name].make())

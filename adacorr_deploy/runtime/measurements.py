"""What calibration left in a bundle, read and checked once each: calibrations and profiles.

Nothing is read but what the manifest lists.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Final, TypeVar

from adacorr_deploy.caching.calibration import Calibration, calibration_from_json, check_blocks
from adacorr_deploy.caching.profile import Profile, check_profile, profile_from_json
from adacorr_deploy.core.bundle import CALIBRATION_DIR, PROFILE_DIR, Bundle, verified_content
from adacorr_deploy.core.errors import CalibrationError

_MAX_CALIBRATION_BYTES: Final = 16 << 20  # eight times one of 1000 steps
_MAX_PROFILE_BYTES: Final = 64 << 20  # a table of 1000 steps and 56 halves takes 8 MB; affine maps of a wide model 4 MB

_Measured = TypeVar("_Measured")


def calibrations(bundle: Bundle) -> dict[str, Calibration]:
    """Read every calibration of a bundle, by file name.

    Raises:
        BundleError: If one has gone since the bundle was opened.
        CalibrationError: If one is not valid, or is not of this bundle's model.
    """
    found = _listed(bundle, CALIBRATION_DIR, _calibration)
    for name, calibration in found.items():
        check_blocks(calibration, bundle.manifest.model, where=str(bundle.file(name)), bundle=str(bundle.path))
    return found


def profiles(bundle: Bundle) -> dict[str, Profile]:
    """Read every profile of a bundle, by file name; errors as those of `calibrations`."""
    found = _listed(bundle, PROFILE_DIR, _profile)
    for name, profile in found.items():
        check_profile(profile, bundle.manifest.model, where=str(bundle.file(name)), bundle=str(bundle.path))
    return found


def _listed(bundle: Bundle, folder: str, read: Callable[[Path, str, str], _Measured]) -> dict[str, _Measured]:
    """Read what the manifest lists in a folder; `read` takes a file, its hash and the bundle's path."""
    return {
        name: read(bundle.file(name), record.sha256, str(bundle.path))
        for name, record in bundle.manifest.files.items()
        if name.startswith(f"{folder}/")
    }


@lru_cache(maxsize=64)  # the hash tells apart what the same path held at other times
def _calibration(file: Path, sha256: str, bundle: str) -> Calibration:
    command = f"adacorr-calibrate {bundle}"
    content = _content(file, sha256, _MAX_CALIBRATION_BYTES, command)
    return calibration_from_json(content, where=str(file), bundle=bundle)


@lru_cache(maxsize=16)  # as above
def _profile(file: Path, sha256: str, bundle: str) -> Profile:
    command = f"adacorr-calibrate {bundle} --policies NAMES"
    content = _content(file, sha256, _MAX_PROFILE_BYTES, command)
    return profile_from_json(content, where=str(file), bundle=bundle)


def _content(file: Path, sha256: str, limit_bytes: int, command: str) -> bytes:
    try:
        return verified_content(file, sha256, limit_bytes=limit_bytes)
    except ValueError as error:
        raise CalibrationError(f"{file}: {error}. Make it again with: {command}") from error

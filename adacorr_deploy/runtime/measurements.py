"""What calibration left in a bundle, read and checked once each: calibrations and profiles.

Nothing is read but what the manifest lists.
"""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final

from adacorr_deploy.caching.calibration import Calibration, CalibrationKey, calibration_from_json, check_blocks
from adacorr_deploy.caching.profile import Profile, check_profile, profile_from_json
from adacorr_deploy.core.bundle import CALIBRATION_DIR, PROFILE_DIR, Bundle, verified_content
from adacorr_deploy.core.errors import CalibrationError

_MAX_CALIBRATION_BYTES: Final = 16 << 20  # eight times one of 1000 steps
_MAX_PROFILE_BYTES: Final = 64 << 20  # a table of 1000 steps and 56 halves takes 8 MB; affine maps of a wide model 4 MB


def calibrations(bundle: Bundle) -> dict[str, Calibration]:
    """Read every calibration of a bundle, by file name.

    Raises:
        BundleError: If one has gone since the bundle was opened.
        CalibrationError: If one is not valid, or is not of this bundle's model.
    """
    return {name: _checked_calibration(bundle, name) for name in _listed(bundle, CALIBRATION_DIR)}


def profiles(bundle: Bundle) -> dict[str, Profile]:
    """Read every profile of a bundle, by file name; errors as those of `calibrations`."""
    return {name: _checked_profile(bundle, name) for name in _listed(bundle, PROFILE_DIR)}


def profile_of_key(bundle: Bundle, key: CalibrationKey) -> Profile | None:
    """Return the profile of a key, None if the bundle holds none that can be read.

    Raises:
        BundleError: If one has gone since the bundle was opened.
    """
    for name in _listed(bundle, PROFILE_DIR):
        with suppress(CalibrationError):
            found = _checked_profile(bundle, name)
            if found.key == key:
                return found
    return None


def _listed(bundle: Bundle, folder: str) -> list[str]:
    return [name for name in bundle.manifest.files if name.startswith(f"{folder}/")]


def _checked_calibration(bundle: Bundle, name: str) -> Calibration:
    file, path = bundle.file(name), str(bundle.path)
    found = _calibration(file, bundle.manifest.files[name].sha256, path)
    check_blocks(found, bundle.manifest.model, where=str(file), bundle=path)
    return found


def _checked_profile(bundle: Bundle, name: str) -> Profile:
    file, path = bundle.file(name), str(bundle.path)
    found = _profile(file, bundle.manifest.files[name].sha256, path)
    check_profile(found, bundle.manifest.model, where=str(file), bundle=path)
    return found


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

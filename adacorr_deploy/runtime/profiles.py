"""The profiles that a bundle holds, read and checked once each."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Final

from adacorr_deploy.caching.profile import Profile, check_profile, profile_from_json
from adacorr_deploy.core.bundle import PROFILE_DIR, Bundle, verified_content
from adacorr_deploy.core.errors import CalibrationError

_MAX_FILE_BYTES: Final = 64 << 20  # a table of 1000 steps and 56 halves takes 8 MB; affine maps of a wide model 4 MB


def profiles(bundle: Bundle) -> dict[str, Profile]:
    """Read every profile of a bundle, by file name; nothing but what the manifest lists is read.

    Raises:
        BundleError: If one has gone since the bundle was opened.
        CalibrationError: If one is not valid, or is not of this bundle's model.
    """
    found = {
        name: _profile(bundle.file(name), record.sha256, str(bundle.path))
        for name, record in bundle.manifest.files.items()
        if name.startswith(f"{PROFILE_DIR}/")
    }
    for name, profile in found.items():
        check_profile(profile, bundle.manifest.model, where=str(bundle.file(name)), bundle=str(bundle.path))
    return found


@lru_cache(maxsize=16)
def _profile(file: Path, sha256: str, bundle: str) -> Profile:
    """Read a profile once; `sha256` tells apart what the same path held at other times."""
    try:
        content = verified_content(file, sha256, limit_bytes=_MAX_FILE_BYTES)
    except ValueError as error:
        raise CalibrationError(
            f"{file}: {error}. Make it again with: adacorr-calibrate {bundle} --policies NAMES"
        ) from error
    return profile_from_json(content, where=str(file), bundle=bundle)

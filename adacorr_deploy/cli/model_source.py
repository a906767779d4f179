"""What MODEL means on a command line: the bundled demo model, or a local path."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import adacorr_deploy
from adacorr_deploy.core.errors import CheckpointError

DEMO: Final = "demo"


def path_from_model(model: str) -> Path:
    """Return the path of a model; `demo` is the one that comes with the package (`./demo` is a folder of that name).

    Raises:
        CheckpointError: If nothing is given, or this installation lacks the demo model.
    """
    if not model:
        raise CheckpointError("MODEL is empty. Give demo, or a path.")
    if model != DEMO:
        return Path(model)
    path = Path(adacorr_deploy.__file__).parent / "demo"
    if not (path / "model_index.json").is_file():
        raise CheckpointError(
            f"This installation holds no demo model ({path}). Install adacorr-deploy again, or give a path as MODEL."
        )
    return path

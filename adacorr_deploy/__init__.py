"""AdaCorr Deploy: Diffusion Transformers as compiled per-block engines whose blocks are reused where it is safe.

`import adacorr_deploy` loads nothing heavy: each name below is imported when it is first used, and none of them needs
torch, diffusers or onnx.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from adacorr_deploy.core.errors import AdaCorrError
    from adacorr_deploy.core.samplers import Sampler
    from adacorr_deploy.runtime import Pipeline, SampleRequest, SampleResult, Trace

    __version__: str

__all__ = [  # noqa: RUF022 (grouped by what they are for)
    # Sampling
    "Pipeline",
    "SampleRequest",
    "SampleResult",
    "Sampler",
    "Trace",
    # Errors
    "AdaCorrError",
    # About
    "__version__",
]

_HOMES: Final = {
    "AdaCorrError": "adacorr_deploy.core.errors",
    "Pipeline": "adacorr_deploy.runtime",
    "SampleRequest": "adacorr_deploy.runtime",
    "SampleResult": "adacorr_deploy.runtime",
    "Sampler": "adacorr_deploy.core.samplers",
    "Trace": "adacorr_deploy.runtime",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = _version()
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # so that the next use is a plain look-up
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("adacorr-deploy")
    except PackageNotFoundError:
        return "0.0.0+uninstalled"  # run from a source tree

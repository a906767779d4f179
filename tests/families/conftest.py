"""Bundles of the families' instances, each built once for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from adacorr_deploy.core import specs
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
from adacorr_deploy.exporters import LoadedModel
from adacorr_deploy.exporters.bundle_builder import BuildOptions, build_bundle
from adacorr_deploy.runtime import Pipeline
from tests.families.instances import loaded_family

Loaded = Callable[[str], LoadedModel]
Built = Callable[[str, BuildOptions], Path]
Opened = Callable[[str, BuildOptions], Pipeline]

WHOLE = BuildOptions(default_policy="none")
SEGMENTS = BuildOptions(default_policy="none", segment=2)
HALVES = BuildOptions(default_policy="none", segment=specs.HALVES)
FLOAT16 = BuildOptions(default_policy="none", precision=DType.FLOAT16)


@pytest.fixture(scope="session")
def family() -> Loaded:
    return cache(loaded_family)


@pytest.fixture(scope="session")
def built(family: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Built:
    @cache
    def build(name: str, options: BuildOptions) -> Path:
        folder = tmp_path_factory.mktemp("families") / "bundle"
        return build_bundle(family(name), folder, OnnxRuntimeBackend(threads=1), options).path

    return build


@pytest.fixture(scope="session")
def opened(built: Built) -> Iterator[Opened]:
    with ExitStack() as pipelines:

        @cache
        def open_bundle(name: str, options: BuildOptions) -> Pipeline:
            return pipelines.enter_context(Pipeline.open(built(name, options), backend=OnnxRuntimeBackend(threads=1)))

        yield open_bundle

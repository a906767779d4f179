"""A small random bundle that is calibrated for 8 steps, one of a model that takes text, and their repositories."""

from __future__ import annotations

from pathlib import Path

import pytest

from adacorr_deploy.core.bundle import Bundle, open_bundle
from adacorr_deploy.serving.orders import OrderBook
from adacorr_deploy.serving.repository import Repository, RepositoryOptions, write_repository
from adacorr_deploy.serving.settings import Limits, Quality
from tests.cli.conftest import STEPS, run_main, write_model
from tests.text_to_image import write_text_to_image

POLICY_FILE = 'name = "any"\n[gate]\nkind = "interval"\ninterval = 4\n[predictor]\nkind = "gated"\n'
MODEL = "tiny"
MAX_QUEUE = 12


@pytest.fixture(scope="session")
def served_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("served")
    path = folder / "tiny.bundle"
    assert run_main("build", write_model(folder / MODEL), "-o", path) == 0
    assert run_main("calibrate", path, "--steps", STEPS, "--images", 2) == 0
    return open_bundle(path)


@pytest.fixture(scope="session")
def repository(served_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return new_repository(served_bundle, tmp_path_factory.mktemp("repository"))


def new_repository(served_bundle: Bundle, folder: Path) -> Repository:
    policy = folder / "careful.toml"
    policy.write_text(POLICY_FILE)
    options = RepositoryOptions(name=MODEL, limits=Limits(max_images=4, max_queue=MAX_QUEUE), policy_files=(policy,))
    return write_repository(served_bundle.path, folder / "models", options)


@pytest.fixture(scope="session")
def version_folder(repository: Repository) -> Path:
    return repository.path / repository.model / "1"


@pytest.fixture(scope="session")
def book(served_bundle: Bundle, repository: Repository, version_folder: Path) -> OrderBook:
    return OrderBook.of_repository(served_bundle.manifest, repository.settings, version_folder)


@pytest.fixture(scope="session")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("text")
    path = folder / "pixart.bundle"
    assert run_main("build", write_text_to_image(folder / "pixart"), "-o", path, "--policy", "fora") == 0
    return open_bundle(path)


@pytest.fixture(scope="session")
def text_repository(text_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    options = RepositoryOptions(name="pixart", limits=Limits(max_images=4), quality={Quality.BALANCED: "fora@2"})
    return write_repository(text_bundle.path, tmp_path_factory.mktemp("repository") / "models", options)

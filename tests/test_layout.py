"""The layout that is fixed: top-level names, links into the package, what the wheel holds, what the pins cover."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LINKED = ("exporters", "engines", "plugins")
TOP_LEVEL = {
    "LICENSE",
    "README.md",
    "adacorr_deploy",
    "engines",
    "exporters",
    "plugins",
    "pyproject.toml",
    "tests",
    "tools",
}
IGNORED_BY_GIT = {"build", "dist"}
COMMANDS = ("adacorr-bench", "adacorr-build", "adacorr-calibrate", "adacorr-run", "adacorr-serve", "adacorr-validate")
PACKAGE_DATA = {".csv", ".json", ".md", ".png", ".safetensors"}


@pytest.mark.parametrize("name", LINKED)
def test_each_link_leads_to_its_top_level_folder(name: str, repository_root: Path) -> None:
    link = repository_root / "adacorr_deploy" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name  # relative: a clone works wherever it lies
    assert link.resolve() == repository_root / name
    assert (link / "__init__.py").is_file()


def test_the_top_level_holds_only_the_fixed_names(repository_root: Path) -> None:
    names = {
        path.name
        for path in repository_root.iterdir()
        if not path.name.startswith(".") and not path.name.endswith(".egg-info") and path.name not in IGNORED_BY_GIT
    }
    assert names == TOP_LEVEL


@pytest.fixture(scope="module")
def wheel_names(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the paths inside a wheel built from a copy of the tree, so that no earlier build folder gets into it."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("adacorr_deploy", *LINKED):
        shutil.copytree(repository_root / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository_root / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = target.glob("adacorr_deploy-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module_under_the_package(wheel_names: set[str], repository_root: Path) -> None:
    package = repository_root / "adacorr_deploy"
    folders = [package, *(package / name for name in LINKED)]  # rglob does not follow links
    modules = {path.relative_to(repository_root).as_posix() for folder in folders for path in folder.rglob("*.py")}
    assert len(modules) > 10
    assert modules <= wheel_names


def test_the_wheel_holds_the_package_data(wheel_names: set[str], repository_root: Path) -> None:
    demo = repository_root / "adacorr_deploy" / "demo"
    data = {path.relative_to(repository_root).as_posix() for path in demo.rglob("*") if path.suffix in PACKAGE_DATA}
    assert any(name.endswith(".safetensors") for name in data)
    assert data <= wheel_names
    assert "adacorr_deploy/py.typed" in wheel_names
    page = repository_root / "adacorr_deploy" / "quality" / "report" / "templates"
    assert {path.relative_to(repository_root).as_posix() for path in page.iterdir()} <= wheel_names
    kernels = {f"adacorr_deploy/plugins/cuda/{path.name}" for path in (repository_root / "plugins" / "cuda").iterdir()}
    assert kernels <= wheel_names


def test_the_wheel_puts_one_name_into_site_packages(wheel_names: set[str]) -> None:
    tops = {name.split("/", 1)[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"adacorr_deploy"}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_installed_and_leads_to_a_function(command: str) -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=command)
    assert callable(entry.load())


def test_every_declared_dependency_is_pinned_within_its_range(repository_root: Path) -> None:
    """The pins and the ranges are written in two files: this holds them together, for each supported Python."""
    pins: dict[str, list[Requirement]] = {}
    for line in (repository_root / "tools" / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    declared = [Requirement(text) for text in importlib.metadata.requires("adacorr-deploy") or ()]
    declared = [each for each in declared if each.name != "adacorr-deploy"]  # an extra may ask for another
    assert declared
    extras = ["", *(importlib.metadata.metadata("adacorr-deploy").get_all("Provides-Extra") or ())]
    for version in ("3.10", "3.11", "3.12", "3.13"):
        environment: dict[str, str] = {key: str(value) for key, value in default_environment().items()}
        environment |= {"python_version": version, "python_full_version": f"{version}.0"}
        for requirement in declared:
            marker = requirement.marker
            if marker and not any(marker.evaluate({**environment, "extra": extra}) for extra in extras):
                continue  # not wanted on this Python
            (pin,) = [
                pin
                for pin in pins[canonicalize_name(requirement.name)]
                if pin.marker is None or pin.marker.evaluate(dict(environment))
            ]
            (pinned,) = pin.specifier
            assert pinned.operator == "=="
            assert requirement.specifier.contains(pinned.version), f"{requirement} against {pin} on Python {version}"

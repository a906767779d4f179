"""A repository is whole or not there, needs nothing that only builds need, and holds what its papers speak of."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adacorr_deploy.core.bundle import Bundle, open_bundle
from adacorr_deploy.core.errors import BundleError, CalibrationError, OutputError, PolicyError, RequestError
from adacorr_deploy.serving.metrics import METRICS
from adacorr_deploy.serving.repository import Repository, RepositoryOptions, write_repository
from adacorr_deploy.serving.server_packages import SERVER_IMAGE
from adacorr_deploy.serving.settings import Quality, settings_from_file
from adacorr_deploy.serving.tensors import inputs_for
from tests.serving.conftest import new_repository
from tests.test_import_time import BUILD_TIME_ONLY


def test_the_layout_is_tritons(served_bundle: Bundle, tmp_path: Path) -> None:
    repository = new_repository(served_bundle, tmp_path)  # the shared one may have been run, and hold bytecode
    names = {path.relative_to(repository.path).as_posix() for path in repository.path.rglob("*") if path.is_file()}
    assert {
        "tiny/config.pbtxt",
        "tiny/configs/cpu.pbtxt",
        "tiny/1/model.py",
        "tiny/1/serving.json",
        "tiny/1/policies/careful.toml",
        "tiny/1/model.bundle/manifest.json",
        "tiny/1/adacorr_deploy/engines/onnxruntime_cpu.py",  # a link in a source tree
        "tiny_stream/config.pbtxt",
        "tiny_stream/1/model.py",
    } <= names
    folders = {path.name for path in repository.path.iterdir() if path.is_dir()}
    assert folders == {"tiny", "tiny_stream"}  # Triton takes any other for a model
    assert not any(re.search(r"/(demo|quality|exporters|cli)/|__pycache__|\.pyc$", name) for name in names)


def test_the_bundle_is_copied_whole(repository: Repository, served_bundle: Bundle, version_folder: Path) -> None:
    assert open_bundle(version_folder / "model.bundle").manifest == served_bundle.manifest
    assert settings_from_file(version_folder / "serving.json") == repository.settings


def test_the_copied_runtime_samples_without_build_packages_or_an_installed_package(version_folder: Path) -> None:
    script = f"""
import sys
sys.path = [path for path in sys.path if path]
sys.path.insert(0, {str(version_folder)!r})
sys.modules.update(dict.fromkeys({BUILD_TIME_ONLY!r}))  # as if not installed
from adacorr_deploy.serving.triton_model import warm_up
from adacorr_deploy.serving.settings import settings_from_file
from adacorr_deploy.runtime import Pipeline
from pathlib import Path
folder = Path({str(version_folder)!r})
with Pipeline.open(folder / "model.bundle") as pipeline:
    warm_up(pipeline, settings_from_file(folder / "serving.json"))
print(sys.modules["adacorr_deploy"].__file__)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip().startswith(str(version_folder))


def test_the_papers_name_what_is_there(repository: Repository, served_bundle: Bundle) -> None:
    readme, docker = ((repository.path / name).read_text() for name in ("README.md", "Dockerfile"))
    assert f"FROM {SERVER_IMAGE}\n" in docker
    of_requests = {field.name for field in inputs_for(served_bundle.manifest)} - {"command", "stream", "after_step"}
    assert all(f"`{name}`" in readme for name in of_requests)
    assert {name for name in re.findall(r"adacorr_\w+", readme) if name != "adacorr_deploy"} <= {
        metric.name for metric in METRICS
    }
    for name in re.findall(r"[\w-]+\.(?:py|txt|json)\b", readme):
        assert (repository.path / name).is_file(), name
    command = json.loads(docker.partition("\nCMD ")[2].splitlines()[0])
    assert command[:2] == ["/bin/sh", "-c"]
    assert subprocess.run(["/bin/sh", "-n", "-c", command[2]], check=False).returncode == 0
    for name in ("cpu", "gpu", "telemetry"):
        pins = (repository.path / f"requirements-{name}.txt").read_text().splitlines()
        assert all(re.match(r"[\w.-]+(\[\w+\])?==[\w.]+( ; .+)?$", pin) for pin in pins)


def test_nothing_is_overwritten_but_a_repository(served_bundle: Bundle, tmp_path: Path, repository: Repository) -> None:
    output = tmp_path / "models"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    for overwrite, message in ((False, "exists"), (True, "is not a repository of adacorr-serve")):
        with pytest.raises(OutputError, match=message):
            write_repository(served_bundle.path, output, RepositoryOptions(overwrite=overwrite))
    assert (output / "mine.txt").read_text() == "mine"
    (output / "mine.txt").unlink()
    output.rmdir()
    for name in ("first", "second"):
        write_repository(served_bundle.path, output, RepositoryOptions(name=name, overwrite=name == "second"))
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == ["second", "second_stream"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def test_a_failure_leaves_nothing(served_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adacorr_deploy.serving.repository.shutil.copytree", full)
    with pytest.raises(OutputError, match="No space left"):
        write_repository(served_bundle.path, tmp_path / "models", RepositoryOptions())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../up", "a b", "x_stream", "-x"])
def test_a_name_that_is_no_models_is_refused(served_bundle: Bundle, tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="can't be a folder's"):
        write_repository(served_bundle.path, tmp_path / "models", RepositoryOptions(name=name))


def test_a_tier_must_be_a_policy_that_the_bundle_can_run(served_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="neither a preset"):
        write_repository(served_bundle.path, tmp_path / "m", RepositoryOptions(quality={Quality.FAST: "quick"}))
    policy = tmp_path / "robust.toml"
    policy.write_text('name = "x"\n[gate]\nkind = "none"\n')
    with pytest.raises(PolicyError, match="its name robust is taken"):
        write_repository(served_bundle.path, tmp_path / "m", RepositoryOptions(policy_files=(policy,)))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("static-mask@mask.json", "can't be read"),
        ("teacache", "policy teacache needs a profile of the model; the bundle holds none"),
        ("scheduled-blocks", "policy scheduled-blocks needs a calibration"),
        ("fora@2+adacorrection@2", r"policy fora@2\+adacorrection@2 needs a calibration"),
        ("dbcache", "nothing is left to reuse"),
    ],
)
def test_a_tier_that_every_request_would_be_refused_for_is_refused(
    served_bundle: Bundle, tmp_path: Path, policy: str, message: str
) -> None:
    with pytest.raises((PolicyError, CalibrationError), match=message):
        write_repository(served_bundle.path, tmp_path / "m", RepositoryOptions(quality={Quality.BALANCED: policy}))
    assert not (tmp_path / "m").exists()


def test_settings_that_were_altered_stop_the_load(version_folder: Path, tmp_path: Path) -> None:
    altered = tmp_path / "serving.json"
    settings = json.loads((version_folder / "serving.json").read_text())
    altered.write_text(json.dumps({**settings, "limits": {"max_queue": 0}}))
    with pytest.raises(BundleError, match=r"limits.max_queue: .* Write the repository anew with adacorr-serve"):
        settings_from_file(altered)

"""What adacorr-build is told of compiled engines reaches the compiler as it was said, or is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from adacorr_deploy.cli.compiler_options import compiler_options
from adacorr_deploy.core.engine_build import CompilerOptions, Profile, WeightLayout
from tests.cli.conftest import Command


def test_saying_nothing_asks_nothing_of_a_compiler() -> None:
    assert compiler_options(None, None, None, None, version_compatible=False, timing_cache=None) is None


def test_every_option_arrives() -> None:
    made = compiler_options(
        "sm_86,sm_120", "2,4,32", 30, WeightLayout.INPUTS, version_compatible=True, timing_cache=Path("t")
    )
    assert made == CompilerOptions(
        profile=Profile(batch=(2, 4, 32), steps=(1, 30, 30)),
        targets=("sm_86", "sm_120"),
        weights=WeightLayout.INPUTS,
        version_compatible=True,
        timing_cache=Path("t"),
    )


@pytest.mark.parametrize(
    "batch",
    ["", "1", "1,2", "1,2,3,4", "8,4,16", "0,1,2", "1,2,5000", "-1,2,3", "1, 2,3", "1,2,٣", "1,2,x,3", "1" * 5000],
)
def test_a_batch_that_is_not_three_sizes_in_order_is_refused(batch: str) -> None:
    with pytest.raises(typer.BadParameter, match="three sizes of 1 to 4096, the smallest first"):
        compiler_options(None, batch, None, None, version_compatible=False, timing_cache=None)


def test_a_backend_that_compiles_nothing_refuses_them(command: Command, model: Path, tmp_path: Path) -> None:
    outcome = command("build", str(model), "-o", str(tmp_path / "out"), "--gpu", "sm_86")
    assert "onnxruntime compiles nothing" in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_on_a_cpu_is_refused_before_any_work(command: Command, model: Path, tmp_path: Path) -> None:
    outcome = command("build", str(model), "-o", str(tmp_path / "out"), "--precision", "bf16")
    assert "Backend onnxruntime runs no bfloat16 models, only float16, float32" in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_tensorrt_where_it_is_not_installed_says_how_to_install_it(
    command: Command, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        outcome = command("build", str(model), "-o", str(tmp_path / "out"), "--backend", "tensorrt")
        assert "pip install 'adacorr-deploy[tensorrt]'" in outcome.error
    else:
        pytest.skip("TensorRT is installed")


@pytest.mark.trt
class TestTensorRTForRTX:
    """Refusals that come from the compiler itself."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("tensorrt_rtx")

    def test_bfloat16_is_calibrated_on_a_gpu_or_later(
        self, command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("adacorr_deploy.engines.tensorrt_backend.TensorRTBackend.is_available", lambda self: False)
        options = ["--backend", "tensorrt-rtx", "--precision", "bf16", "--calibrate"]
        error = command("build", model, "-o", tmp_path / "out", *options).error
        assert "bfloat16 model can't be calibrated without a GPU" in error
        assert "Build it without --calibrate, and run adacorr-calibrate on a machine that has one" in error
        assert list(tmp_path.iterdir()) == []

    def test_a_timing_cache_is_refused_where_nothing_is_timed(
        self, command: Command, model: Path, tmp_path: Path
    ) -> None:
        options = ["--backend", "tensorrt-rtx", "--timing-cache", tmp_path / "cache"]
        error = command("build", model, "-o", tmp_path / "out", *options).error
        assert "TensorRT for RTX times nothing when it compiles. Leave --timing-cache out" in error
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("gpu", ["sm_90", "", "sm_86,,sm_89", "8.6", "sm_86 "])
    def test_an_unknown_gpu_is_refused_with_the_known_ones(
        self, command: Command, model: Path, tmp_path: Path, gpu: str
    ) -> None:
        outcome = command("build", str(model), "-o", str(tmp_path / "out"), "--backend", "tensorrt-rtx", "--gpu", gpu)
        assert "does not compile for" in outcome.error and "sm_86" in outcome.error
        assert list(tmp_path.iterdir()) == []

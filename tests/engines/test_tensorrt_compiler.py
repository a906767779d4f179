"""What the compiler refuses is one clear error that says what is known; what it takes is as the spec says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from adacorr_deploy.core.engine_build import CompilerOptions, EngineBuild, Profile, WeightLayout
from adacorr_deploy.core.errors import BackendUnavailableError, EngineError, RequestError
from adacorr_deploy.core.shapes import BATCH, BRANCHES, ROWS, STEPS
from adacorr_deploy.engines.tensorrt_backend import TensorRTBackend
from adacorr_deploy.engines.tensorrt_compiler import TensorRTCompiler
from adacorr_deploy.engines.tensorrt_modules import TENSORRT, TENSORRT_RTX
from tests.engines.onnx_graphs import WIDTH, part_spec, tensor, write_part

rtx = pytest.mark.skipif("not __import__('importlib').util.find_spec('tensorrt_rtx')")


def test_a_profile_gives_every_named_axis_its_range() -> None:
    axes = Profile(batch=(1, 4, 8), steps=(1, 20, 50)).axes()
    assert axes == {BATCH: (1, 4, 8), BRANCHES: (1, 2, 2), ROWS: (1, 8, 16), STEPS: (1, 20, 50)}


@pytest.mark.parametrize("batch", [(2, 1, 4), (1, 8, 4), (0, 1, 2), (1, 2, 10**6)])
def test_a_profile_out_of_order_or_out_of_range_is_refused(batch: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="batch"):
        Profile(batch=batch)


@pytest.mark.parametrize(
    ("batch", "steps", "option"), [(17, 50, "--batch"), (1, 50, "--batch"), (4, 101, "--max-steps")]
)
def test_a_request_outside_the_profile_is_told_the_range_and_the_option(batch: int, steps: int, option: str) -> None:
    profile = Profile(batch=(2, 8, 16))
    profile.check(batch=2, steps=100)
    with pytest.raises(RequestError, match=rf"(?s)(2 … 16|1 … 100).*{option}"):
        profile.check(batch=batch, steps=steps)


@rtx
@pytest.mark.trt
class TestTensorRTForRTX:
    """The compiler itself, without a GPU."""

    def test_an_unknown_target_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(EngineError, match=r"does not compile for sm_90; it knows .*sm_86.*sm_120"):
            TensorRTCompiler(TENSORRT_RTX, CompilerOptions(targets=("sm_86", "sm_90")))

    def test_version_compatible_engines_are_refused_where_there_are_none(self) -> None:
        with pytest.raises(EngineError, match="no version-compatible engines"):
            TensorRTCompiler(TENSORRT_RTX, CompilerOptions(version_compatible=True))

    def test_a_part_that_it_refuses_is_named_with_its_reason_and_leaves_no_file(self, tmp_path: Path) -> None:
        path = write_part(tmp_path, "y = NoSuchOp (x)", part_spec("block_07"))
        with pytest.raises(
            EngineError, match=r"block_07: TensorRT for RTX .* can't parse it .*: NoSuchOp: .*not found"
        ):
            TensorRTCompiler(TENSORRT_RTX, CompilerOptions()).compile(path, part_spec("block_07"), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_precision_that_a_target_lacks_is_refused_with_the_reason(self, tmp_path: Path) -> None:
        spec = part_spec("block_01", (tensor("x", "rows", WIDTH), tensor("w", WIDTH, WIDTH)))
        path = write_part(tmp_path, "y = MatMul (x, w)", spec)
        with pytest.raises(EngineError, match=r"can't compile it for sm_75: .*Turing.*--precision"):
            TensorRTCompiler(TENSORRT_RTX, CompilerOptions(targets=("sm_75",))).compile(path, spec, tmp_path / "out")

    def test_nothing_is_written_to_the_terminal(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        compiler = TensorRTCompiler(TENSORRT_RTX, CompilerOptions())
        compiler.compile(write_part(tmp_path, "y = Relu (x)", part_spec()), part_spec(), tmp_path / "out")
        assert capfd.readouterr() == ("", "")

    def test_engines_of_another_version_are_refused_with_both_versions(self) -> None:
        build = EngineBuild(version="1.2.3", targets=(), weights=WeightLayout.BAKED, profile=Profile())
        with pytest.raises(EngineError, match=r"compiled with TensorRT for RTX 1\.2\.3, and 1\.\d.*is\s+installed"):
            TensorRTBackend(TENSORRT_RTX).check_compatible(build)

    def test_a_plugin_is_never_loaded(self) -> None:
        """Registering one and parsing aborts the process (FACTS.md), so a build must not come near it."""
        code = (
            "import sys; from adacorr_deploy.engines import backend_by_name; backend_by_name('tensorrt-rtx'); "
            "print([name for name in sys.modules if name.startswith('tensorrt') and 'plugin' in name])"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "[]"


def test_tensorrt_takes_no_list_of_gpus_and_is_told_how_to_be_installed() -> None:
    with pytest.raises((EngineError, BackendUnavailableError), match=r"--gpu|'adacorr-deploy\[tensorrt\]'"):
        TensorRTCompiler(TENSORRT, CompilerOptions(targets=("sm_86",)))

"""TensorRT times a layer once: for all parts of a build, and with a file for all builds on that GPU."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from adacorr_deploy.core.engine_build import CompilerOptions, Profile, WeightLayout
from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.engines.tensorrt_compiler import TensorRTCompiler
from adacorr_deploy.engines.tensorrt_modules import TENSORRT
from tests.engines import fake_tensorrt_builder as fake
from tests.engines.onnx_graphs import part_spec, write_part

BLOCKS = 28


@pytest.fixture(autouse=True)
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    fake.tuned.clear()


def compiled(tmp_path: Path, options: CompilerOptions, blocks: int = BLOCKS) -> list[list[object]]:
    """Compile equal blocks, and return what each plan says of itself: layers, flags, profiles."""
    compiler = TensorRTCompiler(TENSORRT, options)
    plans = []
    for index in range(blocks):
        spec = part_spec(f"block_{index:02d}")
        path = write_part(tmp_path, "y = Relu (x)", spec)
        plans.append(json.loads(compiler.compile(path, spec, tmp_path / "out").path.read_bytes()))
        compiler.keep_tunings()
    return plans


@pytest.mark.parametrize("layout", WeightLayout)
def test_equal_blocks_are_tuned_once(tmp_path: Path, layout: WeightLayout) -> None:
    plans = compiled(tmp_path, CompilerOptions(weights=layout))
    assert fake.tuned == ["Relu"]
    assert len(plans) == BLOCKS and all(plan == plans[0] for plan in plans)
    assert not list(tmp_path.glob("*cache*")), "no file was asked for"


def test_a_file_keeps_tunings_for_the_next_build(tmp_path: Path) -> None:
    options = CompilerOptions(timing_cache=tmp_path / "tunings")
    for _ in range(2):
        compiled(tmp_path, options, blocks=2)
    assert fake.tuned == ["Relu"]
    assert json.loads((tmp_path / "tunings").read_bytes()) == [[fake.__version__, fake.GPU], ["Relu"]]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'[["11.4.0", "sm_80"], []]', "of another device"),
        (b'[["10.0", "sm_90"], []]', "of another device"),
        (b"\0\xff", "corrupt"),
        (b"[]", "corrupt"),
    ],
)
def test_tunings_of_another_machine_are_refused_before_any_work_and_left_alone(
    tmp_path: Path, content: bytes, why: str
) -> None:
    path = tmp_path / "tunings"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=rf"tunings is not one of this GPU and TensorRT .*{why}.*--timing-cache"):
        TensorRTCompiler(TENSORRT, CompilerOptions(timing_cache=path))
    assert path.read_bytes() == content


def test_a_folder_is_no_timing_cache(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"can't be read: .*--timing-cache"):
        TensorRTCompiler(TENSORRT, CompilerOptions(timing_cache=tmp_path))


def test_flags_and_profiles_are_what_was_asked_for(tmp_path: Path) -> None:
    options = CompilerOptions(version_compatible=True, profile=Profile(batch=(1, 4, 8)))
    ((layers, flags, profiles),) = compiled(tmp_path, options, blocks=1)
    assert (layers, flags) == (["Relu"], [int(fake.BuilderFlag.VERSION_COMPATIBLE)]), "and no TF32"
    assert [[shape[0] for shape in shapes] for shapes in profiles[0].values()] == [[1, 8, 16]]  # type: ignore[index]


@pytest.mark.trt
def test_the_stand_in_takes_the_arguments_that_the_real_module_takes() -> None:
    real = pytest.importorskip("tensorrt_rtx", reason="its builder is TensorRT's")
    for owner, name in (
        ("IBuilderConfig", "create_timing_cache"),
        ("IBuilderConfig", "set_timing_cache"),
        ("IBuilderConfig", "get_timing_cache"),
        ("IBuilderConfig", "set_flag"),
        ("IBuilderConfig", "clear_flag"),
        ("IBuilderConfig", "add_optimization_profile"),
        ("IOptimizationProfile", "set_shape"),
        ("ITimingCache", "serialize"),
        ("OnnxParser", "parse"),
        ("Builder", "create_network"),
        ("Builder", "build_serialized_network"),
    ):
        signature = re.search(r"\((.*?)\) ->", getattr(getattr(real, owner), name).__doc__)
        assert signature is not None
        expected = re.findall(r"(\w+):", re.sub(r"\[.*?\]", "", signature[1]))
        code = getattr(getattr(fake, owner), name).__code__
        assert list(code.co_varnames[: code.co_argcount]) == expected, f"{owner}.{name}"

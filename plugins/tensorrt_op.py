"""The op's kernels as TensorRT 11 plugins: quickly deployable ones, compiled ahead of time.

Their PTX goes into the plan, so what serves it needs neither Python nor a library of ours. TensorRT's ONNX parser takes
them for the nodes of `onnx_service_parts.py` whose `plugin_namespace` asks for them; where they aren't registered it
takes the functions' bodies.

Never run against TensorRT in this project: its library can't be installed where it is developed. The tests hold what
can be held without it: names, signatures, the kernels' arguments, the launches. By hand, these functions went once
through the public Python half of `tensorrt.plugin` (checks, creators, launch parameters), over a stub of the rest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from types import GenericAlias, ModuleType
from typing import Final, Protocol, TypeVar

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.plugins.kernels import KERNELS, TOKEN_STATISTICS, KernelSpec, kernel_launch
from adacorr_deploy.plugins.service_parts import SIGNAL_COUNT, SIGNALS_PART

NAMESPACE: Final = "adacorr"  # TensorRT allows no dot in it
PLUGINS: Final[Mapping[str, KernelSpec]] = {  # by the op type of the ONNX node, which is the plugin's name
    "AdaCorrSignals": KERNELS[SIGNALS_PART],
    "AdaCorrPredict": KERNELS["predict"],
    "AdaCorrBlend": KERNELS["blend"],
}

_PACKAGE: Final = "tensorrt"  # and no other: tensorrt_rtx has the same functions, and aborts when it parses a plugin
_TYPES: Final = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}  # AutoTuneCombination's names
_MOST_THREADS: Final = 1024

Function = TypeVar("Function", bound=Callable[..., object])


class TensorDesc(Protocol):
    """What is used here of `tensorrt.plugin.TensorDesc`."""

    dtype: object

    @property
    def shape_expr(self) -> list[object]: ...

    @property
    def shape(self) -> list[int]: ...

    def like(self) -> TensorDesc: ...


def register_plugins(trt: ModuleType, ptx: bytes) -> None:
    """Register the plugins with TensorRT, if they aren't yet, for every engine that is then built in this process.

    Args:
        trt: The imported module `tensorrt`, 11 or later.
        ptx: What `kernel_compiler.compile_kernels` returned.

    Raises:
        EngineError: If the module is another: TensorRT for RTX takes no plugins, and parsing one aborts the process.
    """
    if trt.__name__ != _PACKAGE:
        raise EngineError(
            f"{trt.__name__} takes no plugins: parsing one aborts the process. Build with the functions' bodies, "
            f"which it compiles, or with --backend {_PACKAGE}."
        )
    plugin = importlib.import_module(f"{_PACKAGE}.plugin")
    registered = getattr(plugin.op, NAMESPACE, None)
    for name, kernel in PLUGINS.items():
        if not hasattr(registered, name):
            _register(trt, plugin, name, kernel, ptx)


def _register(trt: ModuleType, plugin: ModuleType, name: str, kernel: KernelSpec, ptx: bytes) -> None:
    plugin_id = f"{NAMESPACE}::{name}"
    count = len(kernel.inputs)

    def describe(*inputs: TensorDesc) -> tuple[TensorDesc, ...]:
        return _outputs(trt, plugin, kernel, dict(zip(kernel.inputs, inputs, strict=True)))

    def autotune(*inputs_and_outputs: object) -> list[object]:
        return [plugin.AutoTuneCombination(", ".join(_element_types(kernel)))]

    def launch(*tensors: TensorDesc) -> tuple[str, bytes, object, object]:
        return _launch(trt, plugin, kernel, ptx, dict(zip(kernel.inputs, tensors[:count], strict=True)))

    desc = plugin.TensorDesc
    outputs = GenericAlias(tuple, (desc,) * (len(kernel.outputs) + (kernel.scratch is not None)))
    returned = GenericAlias(tuple, (str | bytes, str | bytes, plugin.KernelLaunchParams, plugin.SymExprs))
    plugin.register(plugin_id)(_with_signature(describe, dict.fromkeys(kernel.inputs, desc), outputs))
    plugin.autotune(plugin_id)(_with_signature(autotune, dict.fromkeys((*kernel.inputs, "outputs")), None))
    plugin.aot_impl(plugin_id)(_with_signature(launch, dict.fromkeys((*kernel.inputs, "outputs", "tactic")), returned))


def _with_signature(function: Function, parameters: Mapping[str, object], returned: object) -> Function:
    """Give a function the parameters that TensorRT reads from it, by which it knows a plugin's tensors."""
    signature = Signature(
        [
            Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation or Parameter.empty)
            for name, annotation in parameters.items()
        ],
        return_annotation=returned or Signature.empty,
    )
    vars(function)["__signature__"] = signature
    return function


def _outputs(
    trt: ModuleType, plugin: ModuleType, kernel: KernelSpec, inputs: Mapping[str, TensorDesc]
) -> tuple[TensorDesc, ...]:
    """Return the outputs' descriptions. A scratch is one more output, which the ONNX node leaves unused."""
    rows, tokens, _ = inputs[kernel.rows].shape_expr
    if kernel.scratch is None:
        like = {"tokens_out": kernel.rows, "weight": "estimate"}
        return tuple(inputs[like[name]].like() for name in kernel.outputs)
    signals = plugin.from_shape_expr((rows, SIGNAL_COUNT), dtype=trt.DataType.FLOAT)
    return signals, plugin.from_shape_expr((rows, tokens + 1, TOKEN_STATISTICS), dtype=trt.DataType.FLOAT)  # type: ignore[operator]


def _element_types(kernel: KernelSpec) -> list[str]:
    """Return what TensorRT may pass for each input and output; `|` ties the choices of the tokens to each other."""
    tokens = "|".join(_TYPES.values())
    others = {"gate_steps": "INT64"} | dict.fromkeys(
        ("coefficients", "estimate", "thresholds", "weight", "signals", "scratch"), "FP32"
    )
    scratch = () if kernel.scratch is None else ("scratch",)
    return [others.get(name, tokens) for name in (*kernel.inputs, *kernel.outputs, *scratch)]


def _launch(
    trt: ModuleType, plugin: ModuleType, kernel: KernelSpec, ptx: bytes, inputs: Mapping[str, TensorDesc]
) -> tuple[str, bytes, object, object]:
    """Return a kernel's name, PTX, launch parameters and integers. All sizes are fixed but the rows, a symbol.

    TensorRT's memory for a scratch isn't zeroed, so there a row gets one block, which needs no zeros: as large a one as
    there is. It leaves multiprocessors idle while there are fewer rows than those.
    """
    precisions = {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16"}
    shapes = {
        name: (1, *list(each.shape)[1:]) if name == kernel.rows else tuple(each.shape) for name, each in inputs.items()
    }
    launch = kernel_launch(kernel, precisions[inputs[kernel.rows].dtype], shapes)
    alone = kernel.scratch is not None
    parameters = plugin.KernelLaunchParams(
        grid_x=1 if alone else launch.grid[0],
        grid_y=inputs[kernel.rows].shape_expr[0],
        block_x=_MOST_THREADS if alone else launch.block[0],
    )
    integers = plugin.SymIntExprs.from_tuple([plugin.SymInt32(value) for value in launch.integers])
    return launch.entry, ptx, parameters, integers

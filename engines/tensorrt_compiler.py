"""Compiling parts with TensorRT or TensorRT for RTX: ONNX in, plans out, nothing run.

The networks are strongly typed: precisions are those of the ONNX graph. TF32 is off, so that a float32 engine is one.

Polygraphy could drive the compiler too, but it chooses between the two modules once per process, in an environment
variable, and a build may need either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from adacorr_deploy.core.bundle import replace_file
from adacorr_deploy.core.engine_build import CompilerOptions, EngineBuild, WeightLayout
from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.latents import LatentSpec
from adacorr_deploy.core.specs import PartSpec, TensorSpec
from adacorr_deploy.engines.backend import Artefact
from adacorr_deploy.engines.tensorrt_modules import BuilderConfig, TensorRTModule, TimingCache, new_log
from adacorr_deploy.plugins.kernel_compiler import compile_kernels
from adacorr_deploy.plugins.kernels import kernel_of_part
from adacorr_deploy.plugins.tensorrt_op import register_plugins


class TensorRTCompiler:
    """Compiles the parts of one bundle; equal structures are tuned once, or even compiled once."""

    def __init__(self, module: TensorRTModule, options: CompilerOptions) -> None:
        """Load the module.

        Raises:
            BackendUnavailableError: If the module is not installed.
            EngineError: If it can't do what the options ask.
        """
        self._module = module
        self._options = options
        self._trt: ModuleType = module.load()
        self._log = new_log(self._trt)
        self._builder = self._trt.Builder(self._log)
        self._plans: dict[tuple[Path, str], Path] = {}  # of structures, where weights are inputs
        if options.version_compatible and not module.version_compatible:
            raise EngineError(f"{module.title} has no version-compatible engines. Leave --version-compatible out.")
        if options.timing_cache is not None and module.compiles_without_gpu:
            raise EngineError(f"{module.title} times nothing when it compiles. Leave --timing-cache out.")
        self._tunings = _read_timing_cache(options.timing_cache)
        if not module.compiles_without_gpu:
            self._attached_tunings(self._builder.create_builder_config())  # refused before the work starts
        module.set_targets(self._trt, self._builder.create_builder_config(), options.targets)

    @property
    def description(self) -> EngineBuild:
        """What the manifest says of the engines."""
        return EngineBuild(
            version=self._trt.__version__,
            targets=self._options.targets,
            weights=self._options.weights,
            profile=self._options.profile,
            version_compatible=self._options.version_compatible,
        )

    def for_latents(self, latents: LatentSpec) -> None:
        """Compile for the sizes that the options ask for, or else for the latents' default; errors as the profile's."""
        self._options = replace(self._options, profile=self._options.profile.for_latents(latents))

    def compile(self, onnx_path: Path, spec: PartSpec, directory: Path) -> Artefact:
        """Compile a part into `directory`.

        Where weights are inputs, a part whose structure was compiled before shares that plan.

        Raises:
            EngineError: With the compiler's reason, if it refuses the part.
            OSError: If the plan can't be written.
        """
        if self._module.plugins and kernel_of_part(spec.name) is not None:  # the op, for whoever builds it into a plan
            register_plugins(self._trt, compile_kernels())
        if self._options.weights is WeightLayout.BAKED:
            content, weights = onnx_path.read_bytes(), None
        else:
            content, weights = _with_weights_as_inputs(onnx_path)
        structure = (directory, hashlib.sha256(content).hexdigest())
        path = self._plans.get(structure) if weights is not None else None
        if path is None:
            path = directory / f"{spec.name}.engine"
            plan = self._plan(content, onnx_path, spec)
            directory.mkdir(parents=True, exist_ok=True)
            path.write_bytes(plan)
            self._plans[structure] = path
        return Artefact(path=path, weights=weights)

    def _plan(self, content: bytes, onnx_path: Path, spec: PartSpec) -> bytes:
        network = self._builder.create_network()
        parser = self._trt.OnnxParser(network, self._log)
        self._log.clear()
        if not parser.parse(content, str(onnx_path)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            reasons = [f"{error.node_operator()}: {' '.join(error.desc().split())}" for error in errors[-2:]]
            raise EngineError(self._refused(spec, "parse", "; ".join(reasons)))
        config = self._builder.create_builder_config()
        config.clear_flag(self._trt.BuilderFlag.TF32)
        if self._options.version_compatible:
            config.set_flag(self._trt.BuilderFlag.VERSION_COMPATIBLE)
        self._module.set_targets(self._trt, config, self._options.targets)
        config.add_optimization_profile(self._profile(spec))
        tunings = None if self._module.compiles_without_gpu else self._attached_tunings(config)
        plan = self._builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(self._refused(spec, "compile", self._log.reason()))
        if tunings is not None:
            self._tunings = bytes(tunings.serialize())
        return bytes(plan)

    def _attached_tunings(self, config: BuilderConfig) -> TimingCache:
        """Give a configuration the tunings so far. What is returned must live until the plan is built.

        Raises:
            EngineError: If they are not of this GPU and version.
        """
        self._log.clear()
        tunings = config.create_timing_cache(self._tunings)
        if tunings is None or not config.set_timing_cache(tunings, ignore_mismatch=False):
            raise EngineError(
                f"The timing cache {self._options.timing_cache} is not one of this GPU and {self._module.title} "
                f"{self._trt.__version__} ({self._log.reason()}). Name another with --timing-cache, or remove it."
            )
        return tunings

    def keep_tunings(self) -> None:
        """Write the timing cache's file, if one was asked for.

        Raises:
            OSError: If it can't be written.
        """
        if self._options.timing_cache is not None and self._tunings:
            replace_file(self._options.timing_cache, self._tunings)

    def _profile(self, spec: PartSpec) -> object:
        profile = self._builder.create_optimization_profile()
        axes = {**self._options.profile.axes(), **{name: (least, most, most) for name, least, most in spec.ranges}}
        for tensor in spec.inputs:
            if any(isinstance(dim, str) for dim in tensor.shape):
                profile.set_shape(tensor.name, *(_shape_at(tensor, axes, which) for which in range(3)))
        return profile

    def _refused(self, spec: PartSpec, verb: str, reason: str) -> str:
        targets = ", ".join(self._options.targets) or "its default GPUs"
        return (
            f"{spec.name}: {self._module.title} {self._trt.__version__} can't {verb} it for {targets}: {reason}. "
            "Choose another --precision, --gpu or --backend."
        )


def _shape_at(tensor: TensorSpec, axes: Mapping[str, tuple[int, int, int]], which: int) -> tuple[int, ...]:
    return tensor.resolved({name: sizes[which] for name, sizes in axes.items()})


def _with_weights_as_inputs(onnx_path: Path) -> tuple[bytes, Path | None]:
    """Return the part's ONNX model with its external weights turned into inputs, and the file that holds them, if any.

    What tells one part from another of the same structure (its name) is dropped, so equal structures give equal bytes.
    """
    import onnx

    model = onnx.load(str(onnx_path), load_external_data=False)
    stored = [each for each in model.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL]
    kept = [each for each in model.graph.initializer if each.data_location != onnx.TensorProto.EXTERNAL]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in stored
    )
    model.graph.name = "part"
    files = {entry.value for each in stored for entry in each.external_data if entry.key == "location"}
    if len(files) > 1:
        raise EngineError(f"{onnx_path}: its weights lie in {len(files)} files, not in one. Export the part again.")
    return model.SerializeToString(deterministic=True), onnx_path.parent / files.pop() if files else None


def _read_timing_cache(path: Path | None) -> bytes:
    if path is None or not path.exists():
        return b""
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError(
            f"The timing cache {path} can't be read: {error}. Name another with --timing-cache."
        ) from error

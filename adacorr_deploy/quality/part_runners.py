"""Parts under Polygraphy's comparator: an engine or a PyTorch module behind a session, and the NumPy oracle."""

from __future__ import annotations

import time
import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from adacorr_deploy.core.shapes import BATCH, BRANCHES, IMAGE_OF_TILE, ROWS
from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.engines.backend import Backend, Session
from adacorr_deploy.plugins import oracle
from adacorr_deploy.quality.metrics import max_abs, relative_l2

Arrays = Mapping[str, NDArray[np.generic]]
Tensors = dict[str, NDArray[np.generic]]
NO_SIZES: Final[Mapping[str, int]] = MappingProxyType({})


class PartRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy is untyped
    """Gives a part's inputs to whatever computes it, each in the dtype that its spec says."""

    def __init__(self, name: str, spec: PartSpec) -> None:
        super().__init__(name=name)
        self.part = spec

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for tensor in self.part.inputs:
            shape = tuple(dim if isinstance(dim, int) else None for dim in tensor.shape)  # None: dynamic
            metadata.add(tensor.name, dtype=tensor.dtype.numpy, shape=shape)
        return metadata

    def infer_impl(self, feed_dict: Arrays) -> OrderedDict[str, NDArray[np.generic]]:
        started = time.perf_counter()
        outputs = self.outputs_from_inputs(feed_dict)
        self.inference_time = time.perf_counter() - started
        return OrderedDict(outputs)

    @abstractmethod
    def outputs_from_inputs(self, inputs: Arrays) -> Tensors:
        """Run the part, and return its outputs by name."""


class SessionRunner(PartRunner):
    """A part behind the session protocol, over buffers bound once as in the runtime.

    Its inputs come in the compared part's dtypes and are cast to its own: a float16 engine and the float32 reference
    get the same numbers.
    """

    def __init__(
        self, name: str, spec: PartSpec, backend: Backend, session: Session, sizes: Mapping[str, int] = NO_SIZES
    ) -> None:
        """Take a session.

        Args:
            name: For messages.
            spec: Of the compared part.
            backend: The session's.
            session: Runs it.
            sizes: Of named axes that no input of the part may carry: embed makes tokens of height and width.
        """
        super().__init__(name, spec)
        self._backend, self._session, self._sizes = backend, session, dict(sizes)

    def outputs_from_inputs(self, inputs: Arrays) -> Tensors:
        spec = self._session.spec
        sizes = self._sizes | {
            dim: size
            for tensor in spec.inputs
            for dim, size in zip(tensor.shape, inputs[tensor.name].shape, strict=True)
            if isinstance(dim, str)
        }
        # An axis that no input of the part carries: the rows that embed makes of branches × images.
        sizes.setdefault(ROWS, sizes.get(BRANCHES, 1) * sizes.get(BATCH, 1))
        largest = {name: most for name, _, most in spec.ranges}
        for tile, image in IMAGE_OF_TILE.items():  # a decoder's outputs are larger than its inputs by one factor
            if image in largest:
                sizes[image] = sizes[tile] * largest[image] // largest[tile]
        tensors = (*spec.inputs, *spec.outputs)
        buffers = {tensor.name: self._backend.allocate(tensor.resolved(sizes), tensor.dtype) for tensor in tensors}
        for tensor in spec.inputs:
            buffers[tensor.name].write(np.ascontiguousarray(inputs[tensor.name], dtype=tensor.dtype.numpy))
        self._session.bind(buffers).run()
        self._backend.synchronize()
        return {tensor.name: buffers[tensor.name].read() for tensor in spec.outputs}


class OracleRunner(PartRunner):
    """A service part as the NumPy oracle computes it."""

    @staticmethod
    def knows(name: str) -> bool:
        """Say whether a part is one of the runtime's own."""
        return name.startswith(tuple(_ORACLES))

    def outputs_from_inputs(self, inputs: Arrays) -> Tensors:
        function = next(each for stem, each in _ORACLES.items() if self.part.name.startswith(stem))
        exact = {tensor.name for tensor in self.part.inputs if tensor.dtype is DType.INT64}
        results = function(**{key: each if key in exact else each.astype(np.float32) for key, each in inputs.items()})
        results = results if isinstance(results, tuple) else (results,)
        return dict(zip((tensor.name for tensor in self.part.outputs), results, strict=True))


def _extrapolate(
    *, step: NDArray[np.int64], coefficients: NDArray[np.float32], **tensors: NDArray[np.float32]
) -> tuple[NDArray[np.float32], ...]:
    return oracle.extrapolate(**tensors, sampler_row=coefficients[step[0]])


def _motion(*, tokens: NDArray[np.float32], frame_positions: NDArray[np.float32]) -> NDArray[np.float32]:
    return oracle.motion(tokens.reshape(len(tokens), len(frame_positions), -1))


# By the first words of the parts' names.
_ORACLES: Final[Mapping[str, Callable[..., NDArray[np.generic] | tuple[NDArray[np.generic], ...]]]] = {
    "signals": oracle.signals,
    "predict_": oracle.predict,
    "blend_": oracle.blend,
    "combine_": oracle.combine,
    "modulated": oracle.modulated,
    "probe": oracle.probe,
    "extrapolate_": _extrapolate,
    "output_error": oracle.output_error,
    "motion": _motion,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PartError:
    """How far a part's outputs are from the reference's: the worst of them.

    Attributes:
        max_abs: Largest absolute difference.
        rel_l2: ‖difference‖ ÷ ‖reference‖; NaN if any number is not finite.
        tolerance: Of `rel_l2`.
    """

    max_abs: float
    rel_l2: float
    tolerance: float

    def __bool__(self) -> bool:
        """Say whether the part passes; Polygraphy asks so of every comparison. A NaN never does."""
        return bool(np.isfinite(self.max_abs)) and self.rel_l2 <= self.tolerance


def compared_part(engine: PartRunner, reference: PartRunner, inputs: Arrays, tolerance: float) -> PartError:
    """Run both over the same inputs, and return the worst error over the outputs.

    Args:
        engine: The part as the bundle has it.
        reference: What it should compute.
        inputs: By tensor; rounded to the engine's dtypes before either sees them.
        tolerance: Of the relative L2 error.
    """
    errors: list[PartError] = []

    def compare(found: Arrays, expected: Arrays) -> OrderedDict[str, PartError]:
        by_output = OrderedDict((name, _error(found[name], expected[name], tolerance)) for name in expected)
        errors.extend(by_output.values())
        return by_output

    rounded = OrderedDict(
        (tensor.name, inputs[tensor.name].astype(tensor.dtype.numpy, copy=False)) for tensor in engine.part.inputs
    )
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), warnings.catch_warnings():  # its log goes to stdout: --json's
        warnings.simplefilter("ignore")  # Polygraphy's statistics of outputs that overflow
        runs = Comparator.run([engine, reference], data_loader=[rounded])
        Comparator.compare_accuracy(runs, compare_func=compare)
    return PartError(
        max_abs=float(np.max([error.max_abs for error in errors])),  # NaN if any is
        rel_l2=float(np.max([error.rel_l2 for error in errors])),
        tolerance=tolerance,
    )


def _error(found: NDArray[np.generic], expected: NDArray[np.generic], tolerance: float) -> PartError:
    with np.errstate(all="ignore"):  # NaN and infinity are answers here
        pair = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
        return PartError(max_abs=max_abs(*pair), rel_l2=relative_l2(*pair), tolerance=tolerance)

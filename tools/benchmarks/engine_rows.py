"""What the engines' benchmark measures: its cases, the arms of each, and the file that keeps their rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from adacorr_deploy.core.bundle import replace_file
from adacorr_deploy.core.errors import AdaCorrError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.core.untrusted import first_fault

PYTORCH: Final = "PyTorch"
EAGER: Final = "eager"
COMPILED: Final = "torch.compile"
MONOLITH: Final = "monolith"
BLOCKS: Final = "blocks"
SERVICES: Final = "signals + blend"
BAKED: Final = "baked"
INPUTS: Final = "inputs"
BY_BLOCK: Final = "gated-taylor"  # each block is launched, or predicted, by itself
BY_STEP: Final = "output-taylor"  # all blocks are one launch, or the whole step is predicted
HELD: Final = "hold"  # each block is launched, or its last residual stands for it
HOST: Final = "host"
DEVICE: Final = "device"
DECIDED_RHO: Final = 0.5  # of the arms that decide
PRECISIONS: Final = {"fp32": DType.FLOAT32, "fp16": DType.FLOAT16, "bf16": DType.BFLOAT16}
# They capture graphs, and have two layouts of weights; ONNX Runtime has neither.
COMPILING: Final = ("tensorrt-rtx", "tensorrt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What every arm computes alike: one request. `profile` is the batch that engines are compiled for."""

    size: str
    precision: str
    batch: int
    steps: int
    profile: tuple[int, int, int]  # smallest, tuned for, largest

    def __str__(self) -> str:
        return f"DiT-{self.size} {self.precision} batch {self.batch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to compute it."""

    backend: str  # or PyTorch
    engine: str  # EAGER, COMPILED, MONOLITH, BLOCKS, SERVICES
    weights: str = BAKED
    graphs: bool = False
    reuse: str = BY_BLOCK  # of blocks
    rho: float = 0.0  # of blocks: share of their launches that a static schedule skips
    decided_by: str = ""  # HOST or DEVICE: each block's signals are read there, instead of following a schedule

    def __str__(self) -> str:
        if self.backend == PYTORCH:
            return f"{PYTORCH} {self.engine}" if self.engine == EAGER else f"{self.engine} max-autotune"
        name = f"{self.backend} {self.engine}" + " + graphs" * self.graphs + " + inputs" * (self.weights == INPUTS)
        if self.decided_by:
            return f"{name} decided by the {self.decided_by} ρ {self.rho:g}"
        if self.engine == BLOCKS:  # no commas: --rows is a list of such names
            name += " one by one" if self.reuse == BY_BLOCK else " all at once"
        return f"{name} ρ {self.rho:g}" if self.rho else name


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What an arm took.

    Attributes:
        case: What was computed.
        arm: How.
        seconds: Of whole requests, one per round; none if the arm failed.
        blocks: Block parts of the model.
        rho: Share of block launches that was really skipped.
        graph_launches: Of a step, as the device counts them.
        error: ‖latents − reference‖ ÷ ‖reference‖ at the end, against PyTorch in float32; None if not compared.
        remark: Why it failed; or what else there is to know.
    """

    case: Case
    arm: Arm
    seconds: tuple[float, ...] = ()
    blocks: int = 0
    rho: float = 0.0
    graph_launches: float = 0.0
    error: float | None = None
    remark: str = ""

    @property
    def failed(self) -> bool:
        return not self.seconds

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step: the median over the rounds."""
        return 1000 * statistics.median(self.seconds) / self.case.steps


def arms(backends: Sequence[str], rhos: Sequence[float]) -> Iterator[Arm]:
    """Yield every arm of a case: PyTorch's two, then each backend's."""
    yield Arm(backend=PYTORCH, engine=EAGER)
    yield Arm(backend=PYTORCH, engine=COMPILED)
    for backend in backends:
        yield from _arms_of(backend, (0.0, *rhos))


def _arms_of(backend: str, rhos: Sequence[float]) -> Iterator[Arm]:
    graphs = backend in COMPILING
    monolith, blocks = Arm(backend=backend, engine=MONOLITH), Arm(backend=backend, engine=BLOCKS)
    if graphs:
        yield from (monolith, blocks)
    yield replace(monolith, graphs=graphs)
    for reuse, rho in product((BY_BLOCK, BY_STEP), rhos):
        yield replace(blocks, graphs=graphs, reuse=reuse, rho=rho)
    if graphs:
        for reuse in (BY_BLOCK, BY_STEP):
            yield replace(blocks, graphs=True, weights=INPUTS, reuse=reuse)
        for decided_by in (HOST, DEVICE):
            yield replace(blocks, graphs=True, reuse=HELD, rho=DECIDED_RHO, decided_by=decided_by)
    yield Arm(backend=backend, engine=SERVICES)


def evaluated_steps(steps: int, rho: float, first: int) -> frozenset[int]:
    """Return which steps of a run to evaluate so that a share `rho` is not: the first ones, then evenly up to the last.

    `first` steps must be evaluated before any can be predicted; a run too short for `rho` skips less.
    """
    later = max(steps - first - round(rho * steps), 0)
    return frozenset(range(min(first, steps))) | {
        first + (index + 1) * (steps - first) // later - 1 for index in range(later)
    }


# --- The file --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MachineRows:
    """Rows of one machine: its hardware and the versions on it, as words."""

    machine: dict[str, str]
    rows: list[Row]

    def left(self, case: Case, arms: Iterable[Arm], *, retry: bool) -> list[Arm]:
        """Return the arms of a case that have no row yet; with `retry`, also those that failed."""
        done = {row.arm for row in self.rows if row.case == case and not (retry and row.failed)}
        return [arm for arm in arms if arm not in done]

    def put(self, rows: Sequence[Row]) -> None:
        """Add rows, in place of older ones of the same arms."""
        new = {(row.case, row.arm) for row in rows}
        self.rows[:] = [row for row in self.rows if (row.case, row.arm) not in new] + list(rows)


_FILE: Final = TypeAdapter(list[MachineRows])


class Results:
    """Rows of several machines, in one JSON file that is always whole."""

    def __init__(self, path: Path) -> None:
        """Read what the file holds, if it is there.

        Raises:
            AdaCorrError: If it isn't one of these files.
        """
        self._path = path
        self.machines: list[MachineRows] = []
        if not path.exists():
            return
        try:
            self.machines = _FILE.validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            reason = first_fault(error) if isinstance(error, ValidationError) else error
            raise AdaCorrError(f"{path} is no file of this benchmark ({reason}). Name another with --json.") from error

    def of(self, machine: dict[str, str]) -> MachineRows:
        """Return the rows measured with the same hardware and versions; `save` keeps what is added to them."""
        for known in self.machines:
            if known.machine == machine:
                return known
        self.machines.append(MachineRows(machine, []))
        return self.machines[-1]

    def save(self) -> None:
        """Replace the file.

        Raises:
            AdaCorrError: If it can't be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, _FILE.dump_json(self.machines, indent=1) + b"\n")
        except OSError as error:
            raise AdaCorrError(f"{self._path} can't be written: {error}. Name another with --json.") from error

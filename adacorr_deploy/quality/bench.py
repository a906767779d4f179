"""Policies side by side: the same images on the same bundle, in turns, against the uncached run of the same round.

Every policy gets a partner: `fewer-steps` with as many steps as take the same time, which any cache has to beat.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np

from adacorr_deploy.caching.policy import PRESETS, FewerStepsGate, Policy, policy_named
from adacorr_deploy.core.errors import EngineError, PolicyError, RequestError
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.specs import DType
from adacorr_deploy.quality.bench_options import (
    BenchOptions,
    labels_of_images,
    request_at,
    request_count,
    requests,
)
from adacorr_deploy.quality.bench_rows import BenchRow, PolicyRun, row_of_run, set_scores
from adacorr_deploy.quality.bench_sampling import Sampled, Sampler, without_latents
from adacorr_deploy.quality.bench_store import ResultStore
from adacorr_deploy.quality.features import FeatureSource
from adacorr_deploy.quality.memory_need import require_memory
from adacorr_deploy.runtime import (
    Pipeline,
    SampleRequest,
    check_request,
    controller_for_request,
    sample_with_policy,
)
from adacorr_deploy.runtime.buffers import RunSize
from adacorr_deploy.runtime.pipeline import WORKSPACES_KEPT
from adacorr_deploy.runtime.request import NoiseStream, table_from_request
from adacorr_deploy.runtime.workspace import workspace_bytes

_UNCACHED: Final = PRESETS["none"]
_FEWER_STEPS: Final = "fewer-steps"
_MOST_FEWER: Final = 20  # times fewer steps: what the policy's target allows


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What a bench came to: the table, and each policy's run by name, in the order of the rows."""

    rows: Sequence[BenchRow]
    runs: Mapping[str, PolicyRun]
    options: BenchOptions

    @property
    def failed(self) -> list[str]:
        """Names of the policies that could not be measured."""
        return [row.policy for row in self.rows if row.error]


def bench(
    pipeline: Pipeline,
    policies: Sequence[Policy],
    options: BenchOptions,
    progress: Progress | None = None,
    *,
    store: ResultStore | None = None,
    source: FeatureSource | None = None,
    shown: bool = False,
) -> Bench:
    """Measure policies against the uncached run.

    First every policy samples all images. Then each round samples them again with every policy in turn, the uncached
    run first, so that a drift of the machine's speed touches all alike; only these are timed. The partners that the
    speed-ups call for follow in rounds of their own, and last the samples whose features are compared as sets.

    A policy whose engines fail in between is left out of what follows, and its row says why.

    Args:
        pipeline: An open bundle.
        policies: `none` and the partners come by themselves.
        options: What is sampled.
        progress: Told of every finished request.
        store: Where finished pieces are kept and found again.
        source: The network whose features are compared; needed for `options.samples`.
        shown: Whether the first images are kept as pictures, for a report.

    Raises:
        RequestError: If an option is out of range, two different policies have one name, or this machine has not the
            memory.
        CalibrationError: If a policy needs a calibration that the bundle doesn't hold.
        OutputError: If a finished piece can't be kept.
    """
    chosen = _distinct([_UNCACHED, *policies])
    if options.samples and source is None:
        raise RequestError(
            f"samples is {options.samples}, and there is no network for their features. Give one with --features."
        )
    check_runs(pipeline, chosen, options)
    return _Bench(pipeline, options, progress, store or ResultStore(None), source, shown=shown).run(chosen)


class _Bench:
    """One bench on its way."""

    def __init__(
        self,
        pipeline: Pipeline,
        options: BenchOptions,
        progress: Progress | None,
        store: ResultStore,
        source: FeatureSource | None,
        *,
        shown: bool,
    ) -> None:
        self._pipeline = pipeline
        self._options = options
        self._progress = progress
        self._store = store
        self._source = source
        self._shown = shown
        self._requests = request_count(options, options.images)
        self._done = self._total = 0
        self._sampler = Sampler(pipeline, options, store, lambda text: self._did(text, 1))
        self._runs: dict[str, PolicyRun] = {}

    def run(self, policies: Sequence[Policy]) -> Bench:
        self._measure(policies)
        if missing := self._partners(policies):
            self._measure([_UNCACHED, *missing])
        self._pair(policies)
        if self._options.samples and self._source is not None:
            self._compare_sets(self._source)
        share = _block_share(self._pipeline, self._options)
        if self._progress is not None:
            self._progress("", self._total, self._total)
        uncached = self._uncached
        rows = [row_of_run(run, uncached, self._options, block_share=share) for run in self._runs.values()]
        return Bench(rows=_with_gains(rows), runs=self._runs, options=self._options)

    @property
    def _uncached(self) -> Sampled:
        sampled = self._runs[_UNCACHED.name].sampled
        if sampled is None:
            raise EngineError(f"The uncached run failed: {self._runs[_UNCACHED.name].error}")
        return sampled

    def _measure(self, policies: Sequence[Policy]) -> None:
        """Sample the images of policies that have none yet, then time all of these in rounds."""
        new = [policy for policy in policies if policy.name not in self._runs]
        self._total += self._requests * (len(new) + self._options.rounds * len(policies))
        for policy in new:
            run = self._runs[policy.name] = PolicyRun(policy=policy)
            base = None if policy is _UNCACHED else self._uncached
            self._attempt(run, partial(self._sample, run, base))
        rounds = self._store.rounds(policies, self._options.images)[: self._options.rounds]
        self._did(f"{len(rounds)} rounds found", self._requests * len(policies) * len(rounds))
        while len(rounds) < self._options.rounds:
            rounds.append(self._round(policies, len(rounds) + 1))
        for seconds in rounds:
            for policy in new:
                if policy.name in seconds:
                    self._runs[policy.name].seconds.append(seconds[policy.name])
                    self._runs[policy.name].uncached_seconds.append(seconds[_UNCACHED.name])

    def _sample(self, run: PolicyRun, uncached: Sampled | None) -> None:
        network = self._source.network if self._source is not None else None
        made = self._sampler.sampled(run.policy, uncached, network=network, shown=self._shown)
        run.sampled = made if uncached is None else without_latents(made)

    def _round(self, policies: Sequence[Policy], number: int) -> dict[str, float]:
        seconds: dict[str, float] = {}
        for policy in policies:
            run = self._runs[policy.name]
            if not run.error:
                self._attempt(run, partial(self._time, policy, seconds))
            self._did(f"{policy.name}, round {number} of {self._options.rounds}", self._requests)
        self._store.add_round(policies, self._options.images, seconds)
        return seconds

    def _time(self, policy: Policy, seconds: dict[str, float]) -> None:
        seconds[policy.name] = _seconds_for_all(self._pipeline, policy, self._options)

    def _attempt(self, run: PolicyRun, measure: Callable[[], None]) -> None:
        """Measure, and note the failure of a policy; without the uncached run, nothing can be compared."""
        try:
            measure()
        except (EngineError, PolicyError) as error:
            if run.policy is _UNCACHED:
                raise
            run.error = str(error)

    def _partners(self, policies: Sequence[Policy]) -> list[Policy]:
        """Return the baselines that the policies' speed-ups call for and that were not measured yet."""
        wanted: dict[str, Policy] = {}
        for policy in policies:
            run = self._runs[policy.name]
            if policy is _UNCACHED or run.error or isinstance(policy.gate, FewerStepsGate):
                continue
            steps = equal_latency_steps(self._options.steps, run.speedup)
            known = [other for other in self._fewer_steps() if other.sampled_steps(self._options.steps) == steps]
            partner = known[0] if known else fewer_steps_policy(self._options.steps, steps)
            run.baseline = partner.name
            if not known:
                wanted[partner.name] = partner
        return list(wanted.values())

    def _fewer_steps(self) -> list[Policy]:
        """Return the baselines with images, and the uncached run: it takes as long as what saves nothing."""
        policies = [run.policy for run in self._runs.values() if not run.error]
        return [policy for policy in policies if policy is _UNCACHED or isinstance(policy.gate, FewerStepsGate)]

    def _pair(self, policies: Sequence[Policy]) -> None:
        for policy in policies:
            if baseline := self._runs[policy.name].baseline:
                self._runs[baseline].pairs_with.append(policy.name)

    def _compare_sets(self, source: FeatureSource) -> None:
        samples = self._options.samples
        labels = np.array(labels_of_images(self._pipeline.manifest.model, range(samples)), np.int64)
        runs = [run for run in self._runs.values() if not run.error]
        self._total += request_count(self._options, samples) * len(runs)
        uncached = self._sampler.features(_UNCACHED, source.network)

        def compare(run: PolicyRun) -> None:
            own = run.policy is _UNCACHED
            features = uncached if own else self._sampler.features(run.policy, source.network)
            run.sets = set_scores(features, uncached, labels, source)

        for run in runs:
            self._attempt(run, partial(compare, run))

    def _did(self, text: str, requests_done: int) -> None:
        self._done += requests_done
        if self._progress is not None:
            self._progress(text, min(self._done, self._total), self._total)


def equal_latency_steps(steps: int, speedup: float) -> int:
    """Return the least steps that take at least `steps` ÷ `speedup` steps' time: the baseline is never rushed."""
    least = -(-steps // _MOST_FEWER)
    return min(steps, max(least, math.ceil(steps / speedup - 1e-9))) if math.isfinite(speedup) else steps


def fewer_steps_policy(asked: int, taken: int) -> Policy:
    """Return `fewer-steps@X` that takes `taken` of `asked` steps, with the shortest X that says so."""
    for digits in range(1, 10):
        target = math.floor(asked / taken * 10**digits) / 10**digits  # rounded down: never a step less
        policy = policy_named(f"{_FEWER_STEPS}@{max(target, 1.0):g}")
        if policy.sampled_steps(asked) == taken:
            return policy
    raise AssertionError(f"{taken} of {asked} steps have no target")


def _with_gains(rows: Sequence[BenchRow]) -> list[BenchRow]:
    psnr = {row.policy: row.psnr_db for row in rows}
    return [replace(row, gain_db=row.psnr_db - psnr[row.baseline]) if row.baseline else row for row in rows]


def check_runs(pipeline: Pipeline, policies: Sequence[Policy], options: BenchOptions) -> None:
    """Refuse before anything is timed what a policy or the last request would refuse in its turn.

    Raises:
        RequestError: If a request is out of range, or this machine has not the memory.
        CalibrationError: If a policy needs a calibration that the bundle doesn't hold.
    """
    images = max(options.images, options.samples)
    first = request_at(pipeline, options, 0, images)
    last = request_at(pipeline, options, request_count(options, images) - 1, images)
    check_request(last, pipeline.manifest.model, pipeline.manifest.schedule)  # its seed is the largest
    for policy in policies:
        controller_for_request(pipeline, first, policy)
    _check_memory(pipeline, policies, first, options)


def _check_memory(pipeline: Pipeline, policies: Sequence[Policy], first: SampleRequest, options: BenchOptions) -> None:
    """Refuse if the largest run sizes that a pipeline keeps, and every policy's latents, don't fit into memory."""
    model = pipeline.manifest.model
    sizes = {
        RunSize.of(
            replace(first, steps=policy.sampled_steps(first.steps)),
            history=policy.history,
            whole_steps=policy.predictor.whole_step,
            outputs=policy.revision.evaluations,
        )
        for policy in policies
    }
    spaces = sorted(workspace_bytes(model, size) for size in sizes)[-WORKSPACES_KEPT:]
    latents = DType.FLOAT32.numpy.itemsize * options.images * math.prod(first.latent_shape(model))
    require_memory(
        sum(spaces) + len(policies) * latents,
        what=f"Sampling {options.images} images of {options.steps} steps in batches of {first.batch}",
        lower="--batch" if sum(spaces) > len(policies) * latents else "--images",
    )


def _distinct(policies: Sequence[Policy]) -> list[Policy]:
    """Return each policy once: rows go by name, and a partner may come with any of `fewer-steps`."""
    named: dict[str, Policy] = {}
    for policy in policies:
        if policy.name.startswith(_FEWER_STEPS) and not isinstance(policy.gate, FewerStepsGate):
            raise RequestError(
                f"a policy of gate {policy.gate.kind} is named {policy.name}, as a baseline is. Give it another name."
            )
        if named.setdefault(policy.name, policy) != policy:
            raise RequestError(f"two different policies are named {policy.name}. Give one of them another name.")
    return list(named.values())


def _seconds_for_all(pipeline: Pipeline, policy: Policy, options: BenchOptions) -> float:
    # A pipeline keeps few run sizes allocated: what this policy's needs is allocated and bound before the clock starts.
    sample_with_policy(pipeline, next(requests(pipeline, options)), policy)
    started = time.perf_counter()
    for request in requests(pipeline, options):
        sample_with_policy(pipeline, request, policy)
    return time.perf_counter() - started


def _block_share(pipeline: Pipeline, options: BenchOptions) -> float:
    """Return the share of an uncached step's time that its blocks take: the median of single steps, 0 … 1."""
    request = next(requests(pipeline, options))
    size = RunSize.of(request, history=0, whole_steps=False)
    table = table_from_request(request, pipeline.manifest.model, pipeline.manifest.schedule)
    with pipeline.lease(size, references=lambda block: 0) as (space, slots):
        space.prepare(request, table, NoiseStream(request, request.latent_shape(pipeline.manifest.model)).at(0))
        shares = []
        for _ in range(9):
            started = time.perf_counter()
            space.embed(0)
            before_blocks = time.perf_counter()
            for block, slot in enumerate(slots):
                space.evaluate(block, slot)
            after_blocks = time.perf_counter()
            space.head(0, None)
            shares.append((after_blocks - before_blocks) / (time.perf_counter() - started))
    return statistics.median(shares)

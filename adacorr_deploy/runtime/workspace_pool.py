"""Workspaces of many requests at once: each has its own while it runs, and the next of the same size takes it over."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.runtime.buffers import RunSize
from adacorr_deploy.runtime.pipeline import Pipeline
from adacorr_deploy.runtime.planned_run import PlannedRun
from adacorr_deploy.runtime.slots import CacheSlot
from adacorr_deploy.runtime.workspace import Workspace, workspace_bytes


class WorkspacePool:
    """Lends workspaces, and keeps idle ones up to a limit, the most recently used."""

    def __init__(self, pipeline: Pipeline, *, idle_bytes: int) -> None:
        self._pipeline = pipeline
        self._limit_bytes = idle_bytes
        self._idle: OrderedDict[int, tuple[RunSize, Workspace]] = OrderedDict()  # oldest first
        self._idle_bytes = 0
        self._returns = 0
        self.lent_bytes = 0

    @contextmanager
    def lease(self, run: PlannedRun) -> Iterator[tuple[Workspace, Sequence[CacheSlot]]]:
        """Lend a workspace with cleared slots; they are cleared again when it comes back, however the request ends.

        Raises:
            EngineError: If there is no memory for it.
        """
        size_bytes = self._bytes(run.size)
        space = self._take(run.size)
        self.lent_bytes += size_bytes
        try:
            with space.slots.lease(references=run.references) as slots:
                yield space, slots
            self._keep(run.size, space)
        finally:
            self.lent_bytes -= size_bytes

    def clear(self) -> None:
        """Free all idle workspaces."""
        self._idle.clear()
        self._idle_bytes = 0

    def _take(self, size: RunSize) -> Workspace:
        for key in reversed(self._idle):  # the newest: its memory is the likeliest to be in a cache
            if self._idle[key][0] == size:
                self._idle_bytes -= self._bytes(size)
                return self._idle.pop(key)[1]
        try:
            return self._pipeline.new_workspace(size)
        except EngineError:
            if not self._idle:
                raise
            self.clear()
            return self._pipeline.new_workspace(size)

    def _keep(self, size: RunSize, space: Workspace) -> None:
        self._returns += 1
        self._idle[self._returns] = size, space
        self._idle_bytes += self._bytes(size)
        while self._idle_bytes > self._limit_bytes:
            _, (oldest, _) = self._idle.popitem(last=False)
            self._idle_bytes -= self._bytes(oldest)

    def _bytes(self, size: RunSize) -> int:
        return workspace_bytes(self._pipeline.manifest.model, size)

"""The launches of parts over the buffers of one workspace: each is bound when it is first needed, and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import PartSpec
from adacorr_deploy.engines.backend import Buffer, Launch, Session

LaunchKey = tuple[str | int, ...]  # the part's name, and what tells its launches apart


class BoundLaunches:
    """Runs parts by keys."""

    def __init__(
        self,
        sessions: Mapping[str, Session],
        named: Mapping[str, Buffer],
        fuse: Callable[[Sequence[Launch]], Launch | None],
    ) -> None:
        """Begin with none.

        Args:
            sessions: Of the parts; of one that is not there, a launch is refused when it is asked for.
            named: Buffers that parts are given by the name of their input: of the request, and of what the condition
                part makes.
            fuse: Makes one launch of several, if the backend can.
        """
        self._sessions = sessions
        self._named = named
        self._fuse = fuse
        self._bound: dict[LaunchKey, Launch] = {}
        self._fused: dict[tuple[LaunchKey, ...], Launch | None] = {}
        self._collected: list[Launch] | None = None  # instead of being run, while `collected` asks for them

    def has_part(self, name: str) -> bool:
        return name in self._sessions

    def run(self, key: LaunchKey, tensors: Callable[[], Mapping[str, Buffer]]) -> None:
        """Run a launch; the first time, bind it to `tensors` and the named buffers that the part takes besides.

        Raises:
            EngineError: If the bundle lacks the part.
        """
        launch = self._bound.get(key)
        if launch is None:
            session = self._session(str(key[0]))
            launch = self._bound[key] = session.bind({**named_tensors(session.spec, self._named), **tensors()})
        if self._collected is None:
            launch.run()
        else:
            self._collected.append(launch)

    def run_fused(self, keys: Sequence[LaunchKey]) -> bool:
        """Run launches in one, if all have run before and the backend makes one of them: say whether."""
        several = tuple(keys)
        if several not in self._fused:
            if not all(key in self._bound for key in several):
                return False
            self._fused[several] = self._fuse([self._bound[key] for key in several])
        fused = self._fused[several]
        if fused is not None:
            fused.run()
        return fused is not None

    def collected(self, work: Callable[[], object]) -> tuple[Launch, ...]:
        """Return what `work` would launch, bound and in order, without running it."""
        collected: list[Launch] = []
        self._collected = collected
        try:
            work()
        finally:
            self._collected = None
        return tuple(collected)

    def _session(self, part: str) -> Session:
        if part not in self._sessions:
            raise EngineError(
                f"The bundle has no part {part}, which this policy needs; it has {', '.join(sorted(self._sessions))}. "
                "Rebuild it with adacorr-build."
            )
        return self._sessions[part]


def named_tensors(spec: PartSpec, named: Mapping[str, Buffer]) -> dict[str, Buffer]:
    """Return those of the named buffers that a part takes, or gives."""
    return {tensor.name: named[tensor.name] for tensor in (*spec.inputs, *spec.outputs) if tensor.name in named}

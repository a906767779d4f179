"""A stand-in for the module tensorrt where it compiles, which needs a GPU: it tunes a layer once, and keeps that.

Its methods take what those of the real modules take (`test_tensorrt_tunings.py` compares them with tensorrt_rtx, which
has the same ones), and do what their docstrings say: a cache of tunings must live until the engine is built, and one of
another device or version is not taken.
"""

from __future__ import annotations

import json
import weakref
from enum import IntEnum
from types import SimpleNamespace

__version__ = "11.4.0"
GPU = "sm_90"
tuned: list[str] = []  # every tuning that was timed, in order


class BuilderFlag(IntEnum):
    TF32 = 0
    VERSION_COMPATIBLE = 1


class ILogger:
    Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class ITimingCache:
    def __init__(self, made_for: list[str], layers: list[str]) -> None:
        self.made_for = made_for
        self.layers = layers

    def serialize(self) -> bytes:
        return json.dumps([self.made_for, self.layers]).encode()


class IBuilderConfig:
    def __init__(self, log: ILogger) -> None:
        self.flags = {BuilderFlag.TF32}
        self.profiles: list[dict[str, tuple[tuple[int, ...], ...]]] = []
        self._log = log
        self._cache: weakref.ref[ITimingCache] | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        if not serialized_timing_cache:
            return ITimingCache([__version__, GPU], [])
        try:
            return ITimingCache(*json.loads(serialized_timing_cache))
        except (TypeError, ValueError):
            self._log.log(ILogger.Severity.ERROR, "the timing cache is corrupt")
            return None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache.made_for != [__version__, GPU] and not ignore_mismatch:
            self._log.log(ILogger.Severity.ERROR, "the timing cache is of another device")
            return False
        self._cache = weakref.ref(cache)
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache() if self._cache is not None else None


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:  # noqa: A002
        self.shapes[input] = (min, opt, max)


class Network:
    def __init__(self) -> None:
        self.layers: list[str] = []


class OnnxParser:
    num_errors = 0

    def __init__(self, network: Network, log: ILogger) -> None:
        self._network = network

    def parse(self, model: bytes, path: str) -> bool:
        import onnx

        graph = onnx.load_from_string(model).graph
        self._network.layers += [node.op_type for node in graph.node]
        return True


class Builder:
    def __init__(self, log: ILogger) -> None:
        self._log = log

    def create_network(self, flags: int = 0) -> Network:
        return Network()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._log)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: Network, config: IBuilderConfig) -> bytes:
        cache = config.get_timing_cache()
        assert cache is not None, "the cache was destroyed before the engine was built"
        assert config.profiles, "a network with dynamic inputs needs a profile"
        for layer in network.layers:
            if layer not in cache.layers:
                tuned.append(layer)
                cache.layers.append(layer)
        return json.dumps([network.layers, sorted(config.flags), config.profiles]).encode()

"""FastCache: the authors' two implementations, of all blocks together and of one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from checkout import Checkout, stand_in
from torch import Tensor, nn
from trajectories import STEPS, TOKENS, WIDTH, Counted, l2_change, wandering

REPOSITORY = "NoakLiu/FastCache-xDiT"
FILE = "xfuser/model_executor/cache/utils.py"
DEFINITIONS = ("FastCachedTransformerBlocks",)
ONE_BLOCK = "xfuser/model_executor/accelerator/fastcache.py"
HOW = (
    "Of FastCachedTransformerBlocks the two functions that decide are called in turn, get_modulated_inputs and "
    "are_two_tensor_similar: its forward stops with a TypeError at the first reuse, for want of a residual. "
    f"FastCacheAccelerator of {ONE_BLOCK} is run around a block that counts how often it runs. since_step[t] are "
    "‖x_t − x_(t−1)‖² and ‖x_(t−1)‖² per element, since_evaluation[t] the same against the input of the last step at "
    "which the block ran, norm[t] is ‖x_t‖² per element."
)


Decides = Callable[[Tensor], bool]  # a step's input → whether it is evaluated


class Block(Counted):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.config = SimpleNamespace(hidden_size=WIDTH)


def record(checkout: Checkout) -> list[dict[str, Any]]:
    alone = stand_in("xfuser.core.distributed", get_sp_group=None, get_sequence_parallel_world_size=lambda: 1)
    log = stand_in("xfuser.logger", init_logger=logging.getLogger)
    xfuser = {name: stand_in(name) for name in ("xfuser", "xfuser.core")} | {
        each.__name__: each for each in (alone, log)
    }
    every, one = checkout.module(FILE, "fastcache_blocks", xfuser), checkout.module(ONE_BLOCK, "fastcache_one", xfuser)
    runs = []
    # The code puts all it makes on a GPU.
    with mock.patch.object(Tensor, "cuda", lambda self: self), mock.patch.object(nn.Module, "cuda", lambda self: self):
        for seed in range(3):
            for threshold in (0.05, 0.1, 0.005):
                runs.append(_run("all blocks", _of_all(every.FastCachedTransformerBlocks, threshold), seed, threshold))
                runs.append(_run("one block", _of_one(one.FastCacheAccelerator, threshold), seed, threshold))
    return runs


def _of_all(made: Any, threshold: float) -> Decides:  # noqa: ANN401  code of others
    blocks = made([Block(0)], rel_l1_thresh=threshold)

    def evaluates(tokens: Tensor) -> bool:
        modulated, before, _, _ = blocks.get_modulated_inputs(tokens, None)
        return before is None or not blocks.are_two_tensor_similar(before, modulated, threshold)

    return evaluates


def _of_one(made: Any, threshold: float) -> Decides:  # noqa: ANN401  code of others
    block = Block(0)
    accelerated = made(block, cache_ratio_threshold=threshold, motion_threshold=-1.0)  # no token counts as static

    def evaluates(tokens: Tensor) -> bool:
        before = block.runs
        accelerated(tokens, timestep=0)
        return block.runs > before

    return evaluates


def _run(implementation: str, evaluates: Decides, seed: int, threshold: float) -> dict[str, Any]:
    evaluated: list[int] = []
    since_step, since_evaluation, norm = [], [], []
    inputs = wandering(seed, stride=0.2 if threshold > 0.01 else 0.06)
    for step, tokens in enumerate(inputs):
        since_step.append(l2_change(tokens, inputs[max(step - 1, 0)]))
        since_evaluation.append(l2_change(tokens, inputs[evaluated[-1] if evaluated else 0]))
        norm.append(float(tokens.square().mean()))
        with torch.no_grad():
            evaluated += [step] * evaluates(tokens)
    settings = {
        "steps": STEPS, "elements": TOKENS * WIDTH, "implementation": implementation, "threshold": threshold,
    }  # fmt: skip
    return {
        "settings": settings, "since_step": since_step, "since_evaluation": since_evaluation, "norm": norm,
        "evaluated": evaluated,
    }  # fmt: skip

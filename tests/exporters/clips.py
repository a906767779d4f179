"""A video model's parts run one after the other in PyTorch, as the runtime runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adacorr_deploy.core.sampler_rows import COLUMNS
from adacorr_deploy.core.specs import DType
from adacorr_deploy.exporters.adapter import ExportableModel
from adacorr_deploy.exporters.family_parts import family_parts


class Chain:
    """The parts of a model; `blocks` says which block parts to run, all by default."""

    def __init__(self, model: ExportableModel, segment: int, blocks: Sequence[int] | None = None) -> None:
        spec = model.spec(DType.FLOAT32, segment)
        self.parts = {part.spec.name: part for part in family_parts(model.modules(DType.FLOAT32), spec)}
        names = spec.block_names
        self.blocks = dict(enumerate(names)) if blocks is None else {index: names[index] for index in blocks}

    def model_output(
        self,
        latents: Tensor,
        timesteps: Tensor,
        step: int,
        conditions: Mapping[str, Tensor],
        branches: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the output of every row (R, C, F, H, W), and the learned variance (B, C, F, H, W), 0 if there is none.

        The head gives the branches' weighted sum: each is read by a weight of 1 for it alone. The variance v is read
        off as the deviation of the noise that a step adds, e^v where the log variances are −2 and 2.
        """
        batch, size = latents.shape[0], latents.shape
        known: dict[str, Tensor] = {
            "latents": latents,
            "branches": torch.ones(branches),
            "timesteps": timesteps,
            "frame_positions": torch.arange(size[2]).float(),
            "latent_size": torch.tensor([float(length) for length in size[2:]]),
            "step": torch.tensor([step]),
            "carried": torch.zeros_like(latents),
            "noise": torch.ones_like(latents),
            "coefficients": torch.zeros(len(timesteps), len(COLUMNS)),
            **conditions,
        }
        for name, value in {"noise": 1.0, "log_variance_min": -2.0, "log_variance_max": 2.0}.items():
            known["coefficients"][:, COLUMNS.index(name)] = value
        known |= self._run("condition", known)
        known |= self._run("embed", known)
        for index, name in self.blocks.items():
            known["modulation"] = known[f"modulation_{index:02d}"]
            known["tokens"] = self._run(name, known)["tokens_out"]
        known["modulation"] = known["modulation_head"]
        outputs = []
        for branch in range(branches):
            known["guidance"] = torch.zeros(branches, batch)
            known["guidance"][branch] = 1.0
            results = self._run("head", known)
            outputs.append(results["model_output"])
        return torch.cat(outputs), results["latents_out"].log()

    def _run(self, name: str, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        part = self.parts[name]
        results = part.module(**{tensor.name: known[tensor.name] for tensor in part.spec.inputs})
        return {tensor.name: value for tensor, value in zip(part.spec.outputs, results, strict=True)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float(torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected))


def random_prompts(lengths: Sequence[int], *, tokens: int, width: int) -> dict[str, Tensor]:
    """Random embeddings of so many rows, of which the first `lengths` tokens are real."""
    embeddings = torch.randn(len(lengths), tokens, width, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]
    return {"prompt_embeddings": embeddings, "prompt_mask": mask.long()}


def latents_of(batch: int, frames: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 4, frames, height, width, generator=torch.Generator().manual_seed(2))

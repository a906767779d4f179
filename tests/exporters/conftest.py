"""Small random models, the independent DiT of tools/demo, and exports shared by the tests of this folder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime as ort
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from numpy.typing import NDArray

from adacorr_deploy.core.schedules import Schedule
from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.exporters import ExportableModel, LoadedModel, export_parts, monolithic_step_onnx
from adacorr_deploy.exporters.dit_adapter import DiTModel

Arrays = Mapping[str, NDArray[np.generic]]

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "num_layers": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}


def random_dit(*, learned_variance: bool = True, seed: int = 0, **changes: object) -> DiTTransformer2DModel:
    """A model whose every weight matters: no gate is zero, and all blocks embed alike as in released checkpoints."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**{**CONFIG, "out_channels": 8 if learned_variance else 4, **changes})
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval().requires_grad_(False)


def loaded(model: DiTTransformer2DModel) -> LoadedModel:
    return loaded_as("random", DiTModel(model))


def loaded_as(name: str, model: ExportableModel, schedule: Schedule | None = None) -> LoadedModel:
    """Return a model as a checkpoint that was loaded, by default with its family's schedule."""
    return LoadedModel(
        name=name,
        model=model,
        schedule=schedule or model.training_schedule(),
        checkpoint_sha256="0" * 64,
        class_names=None,
    )


@dataclass(frozen=True)
class Exported:
    folder: Path
    specs: Mapping[str, PartSpec]

    def run(self, name: str, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        """Run a part in ONNX Runtime with `inputs` by name."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(self.folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        outputs = [output.name for output in session.get_outputs()]
        return dict(zip(outputs, session.run(outputs, dict(inputs)), strict=True))


@pytest.fixture(scope="session")
def dit() -> DiTTransformer2DModel:
    return random_dit()


@pytest.fixture(scope="session")
def exported(dit: DiTTransformer2DModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[DType, int], Exported]:
    @cache
    def export(precision: DType, segment: int = 1) -> Exported:
        folder = tmp_path_factory.mktemp(f"parts_{precision.value}_{segment}")
        specs = export_parts(loaded(dit), folder, precision, segment)
        if segment == 1 and precision is DType.FLOAT32:
            specs["step"] = monolithic_step_onnx(loaded(dit), folder, precision, segment)
        return Exported(folder, specs)

    return export


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """tools/demo/dit.py: the original layout, written from the paper and independent of diffusers and of us."""
    path = Path(__file__).parents[2] / "tools" / "demo" / "dit.py"
    spec = importlib.util.spec_from_file_location("demo_dit", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_scheduler(folder: Path) -> Path:
    DDIMScheduler(clip_sample=False).save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(dit: DiTTransformer2DModel, tmp_path: Path) -> Path:
    """A diffusers pipeline folder, as `DiTPipeline.save_pretrained` leaves it (without the vae)."""
    folder = tmp_path / "pipeline"
    dit.save_pretrained(folder / "transformer")
    write_scheduler(folder / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {str(label): f"class {label}" for label in range(10)},
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder

"""Invariant: a checkpoint is loaded whole, checked and without running anything in it; or one line says why not."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

import adacorr_deploy
from adacorr_deploy.core.errors import CheckpointError, SchedulerError, UnsupportedModelError
from adacorr_deploy.core.schedules import NoiseSchedule
from adacorr_deploy.core.specs import DType
from adacorr_deploy.exporters import EXPORTERS, load_checkpoint, reference_modules
from tests.exporters.conftest import loaded, random_dit, write_scheduler

WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = {key: value.clone() for key, value in load_file(path).items()}
    edit(state)
    save_file(state, path)


def test_a_pipeline_folder_gives_model_schedule_and_class_names(pipeline: Path, dit: DiTTransformer2DModel) -> None:
    loaded = load_checkpoint(pipeline)
    assert loaded.name == "pipeline"
    assert loaded.class_names == tuple(f"class {label}" for label in range(10))
    assert isinstance(loaded.schedule, NoiseSchedule)
    assert len(loaded.schedule.betas) == 1000
    assert loaded.schedule.variance_type == "learned_range"  # the model predicts it; a DDIM configuration doesn't say
    assert all(torch.equal(value, dit.state_dict()[key]) for key, value in loaded.model.module.state_dict().items())
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 2.0]), torch.tensor([1, 10])
    assert torch.equal(loaded.model.module(*inputs).sample, dit(*inputs).sample)


@pytest.mark.parametrize("labels", [None, {}])
def test_a_pipeline_without_labels_has_no_class_names(pipeline: Path, labels: object) -> None:
    edit_json(pipeline / "model_index.json", id2label=labels)
    assert load_checkpoint(pipeline).class_names is None


NAMES = {str(label): f"class {label}" for label in range(10)}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"0": "crane"}, "there are 1 class names, but the model has 10 classes"),
        (NAMES | {"10": "null"}, "there are 11 class names, but the model has 10 classes"),
        (NAMES | {"12": "far"}, "id2label names label '12'; its 11 names must be those of the labels 0 … 10"),
        (NAMES | {"-1": "null"}, "id2label names label '-1'"),
        (NAMES | {"00": "twice"}, "id2label names label '00'"),
        (NAMES | {"zero": "text"}, "id2label names label 'zero'"),
        (NAMES | {"3": 3}, "id2label: 3 is 3, allowed is a name"),
        (NAMES | {"3": None}, "id2label: 3 is None, allowed is a name"),
        (NAMES | {"3": ["a", "b"]}, "id2label: 3 is .*, allowed is a name"),
        (NAMES | {"3": "\x1b[31mred"}, r"id2label: 3: '\\x1b\[31mred' holds control characters"),
        (NAMES | {"3": "x" * 257}, "id2label: 3: .* has 257 characters, allowed are 256"),
        (list(NAMES.values()), "id2label is .*, allowed is a JSON object"),
        ("crane", "id2label is 'crane', allowed is a JSON object"),
    ],
)
def test_labels_that_do_not_name_each_class_are_refused(pipeline: Path, labels: object, message: str) -> None:
    edit_json(pipeline / "model_index.json", id2label=labels)
    with pytest.raises(CheckpointError, match=f"{message}.* remove") as caught:
        load_checkpoint(pipeline)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_label_that_stands_there_twice_is_refused(pipeline: Path) -> None:
    index = pipeline / "model_index.json"
    index.write_text(index.read_text().replace('"0": "class 0"', '"0": "class 0", "0": "other"'))
    with pytest.raises(CheckpointError, match="key '0' stands there twice"):
        load_checkpoint(pipeline)


def test_two_classes_may_have_one_name(pipeline: Path) -> None:
    """ImageNet has two cranes: a bird and a machine."""
    edit_json(pipeline / "model_index.json", id2label=NAMES | {"3": "class 4"})
    assert load_checkpoint(pipeline).class_names == tuple((NAMES | {"3": "class 4"}).values())


@pytest.mark.parametrize("as_file", [True, False])
def test_a_transformer_folder_takes_its_scheduler_from_beside(pipeline: Path, as_file: bool) -> None:
    scheduler = pipeline / "scheduler" / ("scheduler_config.json" if as_file else "")
    loaded = load_checkpoint(pipeline / "transformer", scheduler)
    assert loaded.name == "transformer"
    assert loaded.checkpoint_sha256 == load_checkpoint(pipeline).checkpoint_sha256


def test_shards_equal_the_single_file(pipeline: Path, dit: DiTTransformer2DModel) -> None:
    (pipeline / "transformer" / WEIGHTS).unlink()
    dit.save_pretrained(pipeline / "transformer", max_shard_size="100KB")
    assert len(list((pipeline / "transformer").glob("*.safetensors"))) > 1
    loaded = load_checkpoint(pipeline)
    assert all(torch.equal(value, dit.state_dict()[key]) for key, value in loaded.model.module.state_dict().items())


def test_the_legacy_class_of_the_released_dit_is_known(pipeline: Path) -> None:
    index = json.loads((pipeline / "model_index.json").read_text())
    edit_json(
        pipeline / "model_index.json", transformer=["diffusers", "Transformer2DModel"], id2label={**index["id2label"]}
    )
    edit_json(pipeline / "transformer" / "config.json", _class_name="Transformer2DModel", norm_type="ada_norm_zero")
    assert load_checkpoint(pipeline).model.spec(DType.FLOAT32, 1).family == "dit"


def test_half_precision_weights_stay_so_in_memory_and_are_computed_with_in_float32(
    pipeline: Path, dit: DiTTransformer2DModel
) -> None:
    halves = {key: value.half() for key, value in dit.state_dict().items()}
    save_file(halves, pipeline / "transformer" / WEIGHTS)
    model = load_checkpoint(pipeline)
    assert {weight.dtype for weight in model.model.module.parameters()} == {torch.float16}
    expected = random_dit()
    expected.load_state_dict({key: value.float() for key, value in halves.items()})
    inputs = {"timesteps": torch.tensor([500.0]), "labels": torch.tensor([3])}
    for actual, wanted in zip(
        reference_modules(model)["condition"](**inputs),
        reference_modules(loaded(expected))["condition"](**inputs),
        strict=True,
    ):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, wanted)


def test_a_training_checkpoints_command_line_does_not_stop_it(tmp_path: Path) -> None:
    path = tmp_path / "trained.pt"
    torch.save({"ema": {"weight": torch.ones(1)}, "args": argparse.Namespace(model="DiT-XL/2")}, path)
    with pytest.raises(CheckpointError, match="of no known original layout"):  # it was read; its names are the trouble
        load_checkpoint(path)


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    if zipped:
        torch.save({"ema": _Malicious(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(_Malicious(marker), protocol=2))
    with pytest.raises(CheckpointError, match=r"alone: it holds \w+\.system, which isn't tensors"):
        load_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({}, "holds a dict, not a state dict"),
        ({"weight": "text"}, "'weight' holds a str, not a tensor"),
        ({"weight": torch.ones(2, dtype=torch.int8)}, r"weight is torch\.int8"),
        ({"weight": torch.ones(2, device="meta")}, r"weight is torch\.float32 \(torch\.strided, meta\)"),
        ({"weight": torch.ones(2)}, r"\(weight, …\) are of no known original layout \(known families: dit, "),
    ],
)
def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.95])
def test_a_truncated_pickle_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "cut.pt"
    torch.save({"weight": torch.ones(5000)}, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"cut\.pt can't be loaded as tensors alone"):
        load_checkpoint(path)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.9])
def test_truncated_safetensors_are_refused(pipeline: Path, keep: float) -> None:
    path = pipeline / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        load_checkpoint(pipeline)


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere doesn't exist\. Give a diffusers folder.* aren't fetched"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no diffusers folder: it holds neither"):
        load_checkpoint(tmp_path)


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no weight file ends in '\.onnx'\. Known: \.safetensors, \.pt"):
        load_checkpoint(tmp_path / "weights.onnx")


def test_absent_weights_are_refused(pipeline: Path) -> None:
    (pipeline / "transformer" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        load_checkpoint(pipeline)


def test_a_shard_outside_the_folder_is_refused(pipeline: Path) -> None:
    index = pipeline / "transformer" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"pos_embed.proj.bias": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="isn't a file beside it"):
        load_checkpoint(pipeline)


def test_wrong_names_are_counted_and_named(pipeline: Path) -> None:
    def rename(state: dict[str, torch.Tensor]) -> None:
        state["proj_out_9.bias"] = state.pop("proj_out_1.bias")

    edit_weights(pipeline / "transformer" / WEIGHTS, rename)
    with pytest.raises(CheckpointError, match=r"1 missing: proj_out_1\.bias; 1 unexpected: proj_out_9\.bias"):
        load_checkpoint(pipeline)


def test_a_wrong_shape_is_named(pipeline: Path) -> None:
    edit_weights(pipeline / "transformer" / WEIGHTS, lambda state: state.update({"proj_out_1.bias": torch.ones(3)}))
    with pytest.raises(
        CheckpointError, match=r"proj_out_1\.bias has shape \(3,\), DiTTransformer2DModel needs \(128,\)"
    ):
        load_checkpoint(pipeline)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(pipeline: Path, value: float) -> None:
    edit_weights(pipeline / "transformer" / WEIGHTS, lambda state: state["proj_out_1.bias"].view(-1)[5:6].fill_(value))
    with pytest.raises(CheckpointError, match=r"proj_out_1\.bias holds NaN or infinity"):
        load_checkpoint(pipeline)


def test_an_unknown_class_lists_the_known_ones_and_says_how_to_add_another(pipeline: Path) -> None:
    known = f"{', '.join(EXPORTERS)}\\. How to add a family: adacorr_deploy/docs/families\\.md$"
    assert (Path(adacorr_deploy.__file__).parent / "docs" / "families.md").is_file()
    edit_json(pipeline / "transformer" / "config.json", _class_name="UNet2DModel")
    message = rf"config\.json: no exporter knows the class 'UNet2DModel'\. Known: {known}"
    with pytest.raises(UnsupportedModelError, match=message):
        load_checkpoint(pipeline)
    edit_json(pipeline / "model_index.json", transformer=["diffusers", "FluxTransformer2DModel"])
    message = rf"model_index\.json: no exporter knows the class 'FluxTransformer2DModel'\. Known: {known}"
    with pytest.raises(UnsupportedModelError, match=message):
        load_checkpoint(pipeline)
    edit_json(pipeline / "model_index.json", _class_name="StableDiffusionPipeline", transformer=None)
    message = f"the pipeline 'StableDiffusionPipeline' has no transformer. Known transformers: {known}"
    with pytest.raises(UnsupportedModelError, match=message):
        load_checkpoint(pipeline)


def test_the_legacy_class_of_no_known_family_is_refused(pipeline: Path) -> None:
    edit_json(pipeline / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit_json(pipeline / "transformer" / "config.json", _class_name="Transformer2DModel", norm_type="layer_norm")
    message = r"no exporter knows the class .Transformer2DModel with norm_type 'layer_norm'.\. Known: .*families\.md$"
    with pytest.raises(UnsupportedModelError, match=message):
        load_checkpoint(pipeline)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "ada_norm"}, r"norm_type: .*'ada_norm_zero'.*, got 'ada_norm'"),
        ({"upcast_attention": True}, "upcast_attention: .*, got True"),
        ({"num_layers": 10**9}, "num_layers: .*, got 1000000000"),
        ({"patch_size": 3}, "patch_size 3 doesn't divide sample_size 8"),
        ({"out_channels": 5}, "out_channels 5 is neither in_channels 4"),
        ({"activation_fn": "eval"}, "activation_fn: .*, got 'eval'"),
    ],
)
def test_an_unsupported_configuration_says_which_field(pipeline: Path, change: dict[str, object], message: str) -> None:
    edit_json(pipeline / "transformer" / "config.json", **change)
    with pytest.raises(UnsupportedModelError, match=message):
        load_checkpoint(pipeline)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_broken_configuration_is_refused(pipeline: Path, content: str) -> None:
    (pipeline / "transformer" / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json .*Copy it again"):
        load_checkpoint(pipeline)


def test_without_a_scheduler_the_message_says_how_to_give_one(pipeline: Path) -> None:
    with pytest.raises(SchedulerError, match=r"without a scheduler\. Give a scheduler_config\.json .* --scheduler"):
        load_checkpoint(pipeline / "transformer")


def test_a_scheduler_that_is_missing_or_not_linear_is_refused(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(SchedulerError, match="can't be read as JSON"):
        load_checkpoint(pipeline / "transformer", tmp_path / "nowhere")
    clipping = write_scheduler(tmp_path / "clipping")
    edit_json(clipping / "scheduler_config.json", clip_sample=True)
    with pytest.raises(SchedulerError, match="clip_sample"):
        load_checkpoint(pipeline, clipping)

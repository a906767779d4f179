"""Models that take text: prompts, embeddings and sizes by every command, and what is wrong with them in one line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from adacorr_deploy.core.bundle import open_bundle
from adacorr_deploy.core.manifest import MANIFEST_NAME
from adacorr_deploy.core.prompts import TEXT_ENCODER_PART, TOKENIZER_FILE
from adacorr_deploy.runtime import Pipeline
from adacorr_deploy.runtime.conditions import Prompts
from tests.cli.conftest import Command, edit_json, run_main, shown_command
from tests.exporters.random_pixart import PROMPT_WIDTH
from tests.text_to_image import SCALE, SIDE, TOKENS, write_text_to_image

STEPS = ("--steps", 4)
DOG = ("--prompt", "A red dog")


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_to_image(tmp_path_factory.mktemp("text") / "pixart")


@pytest.fixture(scope="module")
def text_bundle(pixart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    output = tmp_path_factory.mktemp("bundles") / "pixart.bundle"
    assert run_main("build", pixart, "-o", output, "--policy", "fora") == 0
    return output


def final_latents(command: Command, bundle: Path, folder: Path, *arguments: object) -> NDArray[np.float32]:
    folder.mkdir(exist_ok=True)
    outcome = command("run", bundle, *STEPS, "--policy", "none", "--save-latents", folder / "x.npy", *arguments)
    assert outcome.code == 0, outcome.stderr
    latents: NDArray[np.float32] = np.load(folder / "x.npy")
    return latents


def encoded(bundle: Path, *prompts: str) -> Prompts:
    with Pipeline.open(bundle) as pipeline:
        return pipeline.encode(prompts)


def write_embeddings(path: Path, prompts: Prompts, negative: Prompts | None = None, **further: object) -> Path:
    tensors = {"prompt_embeddings": prompts.embeddings, "prompt_mask": prompts.mask}
    if negative is not None:
        tensors |= {"negative_embeddings": negative.embeddings, "negative_mask": negative.mask}
    tensors |= {name: np.asarray(value) for name, value in further.items()}
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    return path


# --- Running -----------------------------------------------------------------------------------------------------


def test_a_prompt_makes_images_named_after_it(command: Command, text_bundle: Path, tmp_path: Path) -> None:
    found = command("run", text_bundle, *STEPS, *DOG, "--prompt", "", "-o", tmp_path, "--json").json["images"]
    assert isinstance(found, list)
    assert [Path(path).name for path in found] == ["00_a-red-dog_seed0.png", "01_no-text_seed0.png"]
    for path in found:
        assert Image.open(path).size == (SCALE * SIDE, SCALE * SIDE)
    assert (tmp_path / "grid.png").is_file()


def test_embeddings_of_a_prompt_give_the_same_images_as_the_prompt(
    command: Command, text_bundle: Path, tmp_path: Path
) -> None:
    of_prompt = final_latents(command, text_bundle, tmp_path, *DOG)
    other = final_latents(command, text_bundle, tmp_path, "--prompt", "a blue cat")
    file = write_embeddings(tmp_path / "dog.safetensors", encoded(text_bundle, "a red dog"))
    np.testing.assert_array_equal(final_latents(command, text_bundle, tmp_path, "--embeddings", file), of_prompt)
    assert np.abs(of_prompt - other).max() > 1e-3  # what the prompt says matters


def test_an_image_does_not_depend_on_the_prompts_beside_it(command: Command, text_bundle: Path, tmp_path: Path) -> None:
    alone = final_latents(command, text_bundle, tmp_path, *DOG)
    beside = final_latents(command, text_bundle, tmp_path, *DOG, "--prompt", "a blue cat")
    np.testing.assert_allclose(beside[:1], alone, rtol=0, atol=1e-4 * np.abs(alone).max())


def test_the_negative_prompt_is_the_empty_text_unless_one_is_given(
    command: Command, text_bundle: Path, tmp_path: Path
) -> None:
    default = final_latents(command, text_bundle, tmp_path, *DOG)
    empty = final_latents(command, text_bundle, tmp_path, *DOG, "--negative-prompt", "")
    other = final_latents(command, text_bundle, tmp_path, *DOG, "--negative-prompt", "a tree")
    np.testing.assert_allclose(empty, default, rtol=0, atol=1e-3 * np.abs(default).max())
    assert np.abs(other - default).max() > 1e-2 * np.abs(default).max()
    file = write_embeddings(
        tmp_path / "both.safetensors", encoded(text_bundle, "a red dog"), encoded(text_bundle, "a tree")
    )
    np.testing.assert_array_equal(final_latents(command, text_bundle, tmp_path, "--embeddings", file), other)


def test_half_precision_embeddings_and_masks_of_other_types_are_taken(
    command: Command, text_bundle: Path, tmp_path: Path
) -> None:
    prompts = encoded(text_bundle, "a red dog")
    tensors = {"prompt_embeddings": prompts.embeddings.astype(np.float16), "prompt_mask": prompts.mask.astype(bool)}
    save_file(tensors, tmp_path / "half.safetensors")
    whole = final_latents(command, text_bundle, tmp_path, *DOG)
    half = final_latents(command, text_bundle, tmp_path, "--embeddings", tmp_path / "half.safetensors")
    assert 0 < np.abs(half - whole).max() < 0.05 * np.abs(whole).max()


def test_a_size_is_in_pixels_of_the_images(command: Command, text_bundle: Path, tmp_path: Path) -> None:
    for width, height in ((24, 16), (12, 32)):  # of several tiles, and smaller than one too
        run = ("run", text_bundle, *STEPS, *DOG, "--size", f"{width}x{height}", "-o", tmp_path)
        assert command(*run, "--save-latents", tmp_path / "x.npy").code == 0
        assert np.load(tmp_path / "x.npy").shape == (1, 4, height // SCALE, width // SCALE)
        assert Image.open(tmp_path / "00_a-red-dog_seed0.png").size == (width, height)


# --- Refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs a prompt for each image. Give --prompt TEXT, or --embeddings"),
        (("--class-labels", "1"), "takes no class labels but prompts. Give --prompt"),
        ((*DOG, "--class-labels", "1"), "takes no class labels but prompts"),
        ((*DOG, "--embeddings", "x.safetensors"), "--prompt and --embeddings both say"),
        (("--prompt", "x" * 10_001), "prompt has 10001 characters, allowed are 10000"),
        (
            (*DOG, *("--negative-prompt", "a") * 3),
            "prompts.negative holds 3 prompts, allowed are 1 for all images, or 1",
        ),
        ((*DOG, "--size", "24"), "--size is '24', allowed is WIDTHxHEIGHT in pixels, as 512x768"),
        ((*DOG, "--size", "22x16"), "size: width is 22 pixels, this model takes 4 … 32, in multiples of 4"),
        ((*DOG, "--size", "16x400"), "size: height is 400 pixels, this model takes 4 … 32, in multiples of 4"),
        ((*DOG, "--frames", "4"), "frames is 4, and this model makes no clips"),
        ((*DOG, "--fps", "8"), "makes images, which have no frames. Leave --video and --fps out"),
        (("--embeddings", "nowhere.safetensors"), "can't be read as embeddings: No such file"),
    ],
)
def test_what_the_model_does_not_take_is_one_line(
    arguments: tuple[object, ...], message: str, command: Command, text_bundle: Path, tmp_path: Path
) -> None:
    assert message in command("run", text_bundle, *STEPS, *arguments, "-o", tmp_path).error
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_classes_takes_no_prompts(command: Command, bundle: Path, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("a dog\n")
    for command_line in (("run", bundle, *DOG), ("run", bundle, "--negative-prompt", "x")):
        assert "takes no prompts but class labels, 0 … 2. Give --class-labels" in (
            command(*command_line, "-o", tmp_path / "images").error
        )
    assert "takes no prompts but class labels. Leave --prompts out" in (
        command("calibrate", bundle, "--steps", 4, "--prompts", lines).error
    )
    assert "size: width is 24 pixels, this model takes 12 alone" in (
        command("run", bundle, "--size", "24x12", "-o", tmp_path / "images").error
    )


def _refused_embeddings(prompts: Prompts) -> dict[str, tuple[dict[str, object], str]]:
    embeddings, mask = prompts.embeddings, prompts.mask
    nan = embeddings.copy()
    nan[0, 0, 0] = np.nan
    return {
        "lacking": ({"prompt_embeddings": embeddings}, "lacks the tensor prompt_mask; it holds prompt_embeddings"),
        "unknown": (
            {"prompt_embeddings": embeddings, "prompt_mask": mask, "x": mask},
            "holds a tensor 'x', allowed are prompt_embeddings",
        ),
        "short": (
            {"prompt_embeddings": embeddings[:, :-1], "prompt_mask": mask[:, :-1]},
            f"allowed is a float32 array of shape (B, {TOKENS}, {PROMPT_WIDTH})",
        ),
        "nan": ({"prompt_embeddings": nan, "prompt_mask": mask}, "holds 1 values that are NaN or infinite"),
        "masked": ({"prompt_embeddings": embeddings, "prompt_mask": 0 * mask}, "without a real token"),
        "whole": (
            {"prompt_embeddings": embeddings.astype(np.int64), "prompt_mask": mask},
            "prompt_embeddings is int64, allowed are float32",
        ),
        "half": (
            {"prompt_embeddings": embeddings, "prompt_mask": mask.astype(np.float32)},
            "prompt_mask is float32, allowed are whole numbers or bool",
        ),
        "negative": (
            {"prompt_embeddings": embeddings, "prompt_mask": mask, "negative_mask": mask},
            "lacks the tensor negative_embeddings",
        ),
    }


def test_files_of_embeddings_that_do_not_fit_are_one_line(command: Command, text_bundle: Path, tmp_path: Path) -> None:
    run = ("run", text_bundle, *STEPS, "-o", tmp_path / "images", "--embeddings")
    for name, (tensors, message) in _refused_embeddings(encoded(text_bundle, "a red dog")).items():
        file = tmp_path / f"{name}.safetensors"
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, file)
        assert message in command(*run, file).error
    for name, content in {"empty": b"", "huge": b"\xff" * 16, "text": b"hello, world, this is no header"}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        assert "can't be read as embeddings" in command(*run, tmp_path / f"{name}.safetensors").error
    assert not (tmp_path / "images").exists()


def test_without_the_tokenizers_package_embeddings_still_work(
    command: Command, text_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_embeddings(tmp_path / "dog.safetensors", encoded(text_bundle, "a red dog"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert command("run", text_bundle, *STEPS, "--embeddings", file, "-o", tmp_path / "images").code == 0
    assert "pip install 'adacorr-deploy[text]', or give embeddings" in (
        command("run", text_bundle, *STEPS, *DOG, "-o", tmp_path / "images").error
    )


# --- Bundles -----------------------------------------------------------------------------------------------------


def test_a_bundle_holds_the_encoder_its_tokenizer_and_the_null_prompt(command: Command, text_bundle: Path) -> None:
    manifest = open_bundle(text_bundle).manifest
    assert manifest.text_encoder is not None
    assert TEXT_ENCODER_PART in manifest.parts
    assert TOKENIZER_FILE in manifest.files
    with Pipeline.open(text_bundle) as pipeline:
        empty = pipeline.encode([""])
    name = manifest.null_prompt
    assert name is not None
    stored = np.frombuffer((text_bundle / name).read_bytes()[: empty.embeddings.nbytes], np.float32)
    np.testing.assert_allclose(stored, empty.embeddings.reshape(-1), rtol=0, atol=1e-4)
    document = command("build", "--inspect", text_bundle, "--json").json
    assert isinstance(document["text_encoder"], dict)
    assert document["text_encoder"]["precision"] == "float32"
    shown = command("build", "--inspect", text_bundle).stdout
    assert f"text encoder: float32, {TOKENS} tokens of 64 to embeddings of width {PROMPT_WIDTH}" in shown


def test_a_damaged_tokenizer_or_manifest_is_refused(command: Command, text_bundle: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(text_bundle, tmp_path / "own.bundle"))
    (own / TOKENIZER_FILE).write_bytes(b"{}")
    run = ("run", own, *STEPS, *DOG, "-o", tmp_path / "images")
    assert f"{TOKENIZER_FILE} was altered" in command(*run).error
    manifest = json.loads((text_bundle / MANIFEST_NAME).read_text())
    for change, message in (
        ({"text_encoder": None}, "parts holds text_encoder, and text_encoder doesn't say how it is used"),
        ({"text_encoder": {**manifest["text_encoder"], "padding": 64}}, "padding 64 is no token of a vocabulary of 64"),
        ({"text_encoder": {**manifest["text_encoder"], "vocabulary": 2**40}}, "text_encoder.vocabulary"),
        ({"parts": {k: v for k, v in manifest["parts"].items() if k != TEXT_ENCODER_PART}}, "which the bundle has not"),
        ({"files": {k: v for k, v in manifest["files"].items() if k != TOKENIZER_FILE}}, "which has no hash"),
    ):
        edit_json(own / MANIFEST_NAME, **{**manifest, **change})
        assert message in command(*run).error


def test_a_build_without_the_encoder_takes_embeddings_alone(
    command: Command, pixart: Path, text_bundle: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.bundle"
    assert command("build", pixart, "-o", bare, "--policy", "fora", "--no-text-encoder").code == 0
    assert open_bundle(bare).manifest.text_encoder is None
    run = ("run", bare, *STEPS, "-o", tmp_path / "images")
    assert "holds no text encoder. Give embeddings in place of prompts, or rebuild" in command(*run, *DOG).error
    dog, empty = encoded(text_bundle, "a red dog"), encoded(text_bundle, "")
    alone = write_embeddings(tmp_path / "alone.safetensors", dog)
    assert "guidance needs a prompt for the images without condition" in command(*run, "--embeddings", alone).error
    assert command(*run, "--embeddings", alone, "--guidance", 1).code == 0
    assert command(*run, "--embeddings", write_embeddings(tmp_path / "both.safetensors", dog, empty)).code == 0


@pytest.mark.slow
def test_what_a_build_shows_next_runs_as_it_stands(
    command: Command, pixart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the encoder and calibrated, on random embeddings as the build knows no prompts; and without the encoder."""
    monkeypatch.chdir(tmp_path)
    sample, calibrate = command("build", pixart, "-o", "with.bundle", "--calibrate").stdout.splitlines()[-2:]
    assert sample == "Sample from it with: adacorr-run with.bundle --prompt TEXT -o images"
    assert " robust " in command(*shown_command(sample)).stdout
    assert (tmp_path / "images" / "00_text_seed0.png").is_file()
    assert calibrate == (
        "It was calibrated on random embeddings; calibrate it on your prompts with: "
        "adacorr-calibrate with.bundle --prompts FILE"
    )
    (tmp_path / "FILE").write_text("a red dog\na blue cat\n")
    before = open_bundle(tmp_path / "with.bundle").manifest.files
    assert command(*shown_command(calibrate)).code == 0
    assert open_bundle(tmp_path / "with.bundle").manifest.files != before
    calibrate, sample = command("build", pixart, "-o", "bare.bundle", "--no-text-encoder").stdout.splitlines()[-2:]
    prompts = encoded(tmp_path / "with.bundle", "a red dog", "a blue cat")
    write_embeddings(tmp_path / "FILE.safetensors", prompts, encoded(tmp_path / "with.bundle", ""))
    assert sample.endswith("adacorr-run bare.bundle --embeddings FILE.safetensors --policy none -o images")
    assert command(*shown_command(sample)).code == 0
    assert calibrate.endswith("needs a calibration first: adacorr-calibrate bare.bundle --prompts FILE.safetensors")
    assert command(*shown_command(calibrate), "--steps", 6, "--images", 2).code == 0


def test_bad_encoders_are_one_line(command: Command, pixart: Path, model: Path, tmp_path: Path) -> None:
    build = ("build", pixart, "-o", tmp_path / "made.bundle", "--policy", "fora")
    encoder = pixart / "text_encoder"
    assert "it names a text encoder, and --no-text-encoder leaves it out" in (
        command(*build, "--text-encoder", encoder, "--no-text-encoder").error
    )
    assert "T5 overflows in float16" in command(*build, "--text-precision", "fp16").error
    assert "takes no prompts, so it has no use for a text encoder" in (
        command("build", model, "-o", tmp_path / "made.bundle", "--text-encoder", encoder).error
    )
    assert "runs no bfloat16" in command(*build, "--text-precision", "bf16").error
    assert not (tmp_path / "made.bundle").exists()


# --- Measuring ---------------------------------------------------------------------------------------------------


def test_validate_compares_the_encoder_too(command: Command, pixart: Path, text_bundle: Path) -> None:
    document = command("validate", text_bundle, "--reference", pixart, "--steps", 6, "--json").json
    assert isinstance(document["parts"], dict)
    assert document["parts"][TEXT_ENCODER_PART]["rel_l2"] <= 1e-4
    assert document["passed"] is True


def test_measurements_go_through_the_prompts_of_a_file(command: Command, text_bundle: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(text_bundle, tmp_path / "own.bundle"))
    lines = tmp_path / "prompts.txt"
    lines.write_text("a red dog\n\na blue cat\n")
    calibrate = ("calibrate", own, "--steps", 6, "--images", 2)
    contents = []
    for prompts in ((), ("--prompts", lines)):
        document = command(*calibrate, *prompts, "--json").json
        contents.append(json.loads(Path(str(document["calibration"])).read_text()))
    assert contents[0] != contents[1]  # random embeddings, and real ones
    file = write_embeddings(tmp_path / "x.safetensors", encoded(own, "a red dog", "a blue cat"))
    document = command(*calibrate, "--prompts", file, "--json").json
    assert json.loads(Path(str(document["calibration"])).read_text()) == contents[1]  # the same, in another form
    bench = ("bench", own, "--policies", "none,fora", "--steps", 4, "--images", 2, "--batch", 2, "--rounds", 1)
    assert command(*bench, "--prompts", lines, "--json").code == 0
    lines.write_text("\n \n")
    assert "holds 0 prompts, allowed are 1" in command(*bench, "--prompts", lines).error
    lines.write_bytes(b"\xff")
    assert "can't be read as prompts" in command(*bench, "--prompts", lines).error

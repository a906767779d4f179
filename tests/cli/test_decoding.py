"""A model of latents gives images where its VAE is in the bundle, by every command that has to do with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adacorr_deploy.core.bundle import open_bundle
from adacorr_deploy.core.specs import DECODE_PART
from adacorr_deploy.runtime import Pipeline
from tests.cli.conftest import CLASS_NAMES, SIDE, Command, edit_json, run_main, write_model
from tests.exporters.random_vae import random_vae, write_vae


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with a VAE."""
    folder = write_model(tmp_path_factory.mktemp("latent") / "pipeline", channels=4)
    write_vae(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def decoding(latent_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle, decoded in tiles of 8 of 12 latent pixels; not to be changed."""
    output = tmp_path_factory.mktemp("decoding") / "latent.bundle"
    assert run_main("build", latent_model, "-o", output, "--policy", "fora", "--vae-tile", 8) == 0
    return output


def test_the_images_are_the_decoders_of_the_latents_that_are_kept(
    command: Command, decoding: Path, tmp_path: Path
) -> None:
    options = ("--steps", 3, "--save-latents", tmp_path / "final.npy", "-o", tmp_path, "--json")
    found = command("run", decoding, *options).json
    assert isinstance(found["images"], list)
    assert len(found["images"]) == len(CLASS_NAMES)
    with Pipeline.open(decoding) as pipeline:
        images = pipeline.decode(np.load(tmp_path / "final.npy"))
    for path, image in zip(found["images"], images, strict=True):
        pixels = np.asarray(Image.open(path), dtype=np.float64)
        assert pixels.shape == (2 * SIDE, 2 * SIDE, 3)
        np.testing.assert_allclose(pixels, (image.transpose(1, 2, 0) + 1) * 127.5, atol=0.51)
    assert (tmp_path / "grid.png").is_file()


def test_without_images_nothing_is_decoded(
    command: Command, decoding: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "decoder", lambda self: pytest.fail("the decoder was opened"))
    assert command("run", decoding, "--steps", 2, "--save-latents", tmp_path / "final.npy").code == 0


def test_validate_compares_the_decoder_too(
    command: Command, latent_model: Path, decoding: Path, tmp_path: Path
) -> None:
    document = command("validate", decoding, "--reference", latent_model, "--steps", 6, "--json").json
    assert isinstance(document["parts"], dict)
    assert document["parts"][DECODE_PART]["rel_l2"] <= 1e-4
    assert document["passed"] is True
    without = Path(shutil.copytree(latent_model, tmp_path / "without"))
    shutil.rmtree(without / "vae")
    assert "holds a VAE's decoder, and the reference has none" in (
        command("validate", decoding, "--reference", without, "--steps", 6).error
    )
    other = write_vae(tmp_path / "other", random_vae(seed=9))
    assert "decodes with another VAE" in (
        command("validate", decoding, "--reference", without, "--vae", other, "--steps", 6).error
    )


def test_inspect_shows_the_decoder(command: Command, decoding: Path) -> None:
    document = command("build", "--inspect", decoding, "--json").json
    manifest = open_bundle(decoding).manifest
    assert manifest.decoder is not None
    assert document["decoder"] == {
        "precision": "float32",
        "tile": [8, 8],
        "overlap": 2,
        "scale": 2,
        "channels": 3,
        "vae_sha256": manifest.decoder.vae_sha256,
        "frames": 1,
    }
    shown = command("build", "--inspect", decoding).stdout
    assert "decoder: float32, 8 × 8 latents to 16 × 16 pixels at once, overlap 2; VAE sha256" in shown


@pytest.mark.slow
def test_a_build_leaves_it_out_or_takes_another(
    command: Command, latent_model: Path, decoding: Path, tmp_path: Path
) -> None:
    assert command("build", latent_model, "-o", tmp_path / "b", "--policy", "fora", "--no-vae").code == 0
    assert open_bundle(tmp_path / "b").manifest.decoder is None
    other = write_vae(tmp_path / "other", random_vae(seed=9))
    options = ("--policy", "fora", "--vae", other, "--vae-precision", "fp16", "--overwrite")
    assert command("build", latent_model, "-o", tmp_path / "b", *options).code == 0
    decoder, own = open_bundle(tmp_path / "b").manifest.decoder, open_bundle(decoding).manifest.decoder
    assert decoder is not None
    assert own is not None
    assert (decoder.tile, decoder.precision.value) == ((SIDE, SIDE), "float16")
    assert decoder.vae_sha256 != own.vae_sha256
    assert command("run", tmp_path / "b", "--steps", 2, "-o", tmp_path / "images").code == 0


def test_bad_vaes_are_one_line(command: Command, latent_model: Path, tmp_path: Path) -> None:
    build = ("build", latent_model, "-o", tmp_path / "made.bundle", "--policy", "fora")
    vae = write_vae(tmp_path / "vae", random_vae(latent_channels=3))
    assert "decodes latents of 3 channels, the model's have 4" in command(*build, "--vae", vae).error
    edit_json(vae / "config.json", _class_name="VQModel")
    assert "known are AutoencoderKL, AutoencoderKLTemporalDecoder" in command(*build, "--vae", vae).error
    assert "it names a VAE, and --no-vae leaves it out" in command(*build, "--vae", vae, "--no-vae").error
    assert "Invalid value for '--vae-tile'" in command(*build, "--vae-tile", 7).error
    assert "Invalid value for '--vae-chunk'" in command(*build, "--vae-chunk", 0).error
    assert not (tmp_path / "made.bundle").exists()

"""Decoding tile by tile gives what one piece would, where a decoder looks no further than a tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from adacorr_deploy.core.bundle import open_bundle
from adacorr_deploy.core.errors import BundleError, EngineError, RequestError, SamplingCancelledError
from adacorr_deploy.core.manifest import MANIFEST_NAME, PartRecord, file_record
from adacorr_deploy.core.shapes import IMAGE_HEIGHT, TILE_HEIGHT
from adacorr_deploy.core.specs import DECODE_PART, DecoderSpec, DType, decode_spec
from adacorr_deploy.runtime import Pipeline
from adacorr_deploy.runtime.decoder import Decoder
from tests.runtime.conftest import write_bundle
from tests.runtime.fake_backend import FakeBackend, FakeSession
from tests.runtime.tiny_dit import TinyDiT

Array = NDArray[np.float32]


def decoder_spec(tile: tuple[int, int], overlap: int = 1, scale: int = 2, frames: int = 1) -> DecoderSpec:
    return DecoderSpec(
        precision=DType.FLOAT32,
        tile=tile,
        overlap=overlap,
        scale=scale,
        channels=3,
        vae_sha256="0" * 64,
        frames=frames,
    )


def enlarged(latents: Array, scale: int = 2) -> Array:
    """A decoder that looks at one latent pixel at a time: three shades of it, squashed."""
    shades = latents[:, :1] * np.array([1.0, 0.5, -0.25], np.float32)[:, None, None]
    return np.tanh(shades).repeat(scale, axis=2).repeat(scale, axis=3)


def decoder(model: TinyDiT, spec: DecoderSpec, backend: FakeBackend | None = None) -> tuple[Decoder, FakeSession]:
    backend = backend or FakeBackend({})
    session = FakeSession(
        decode_spec(model.spec, spec),
        lambda tensors: {"images": enlarged(np.asarray(tensors["latents"], np.float32))},
        backend,
    )
    return Decoder(spec, session, backend), session


@pytest.mark.parametrize("tile", [(4, 4), (3, 4), (4, 2), (2, 2)])
def test_tiles_make_the_image_that_one_piece_makes(model: TinyDiT, tile: tuple[int, int]) -> None:
    latents = np.random.default_rng(0).standard_normal((3, 1, 4, 4), np.float32)
    made, session = decoder(model, decoder_spec(tile))
    told: list[tuple[str, int, int]] = []
    images = made.images(latents, progress=lambda what, done, total: told.append((what, done, total)))
    np.testing.assert_allclose(images, enlarged(latents), rtol=1e-5, atol=1e-6)
    assert images.dtype == np.float32
    tiles = {(4, 4): 1, (3, 4): 2, (4, 2): 3, (2, 2): 9}[tile]
    assert session.launches == 3 * tiles
    assert told == [("decoding", done, 3 * tiles) for done in range(3 * tiles + 1)]


def test_what_is_beyond_the_range_of_an_image_is_clipped(model: TinyDiT) -> None:
    spec = decoder_spec((4, 4))
    backend = FakeBackend({})
    large = np.full((1, 3, 8, 8), 1.5, np.float32)
    session = FakeSession(decode_spec(model.spec, spec), lambda tensors: {"images": large}, backend)
    images = Decoder(spec, session, backend).images(np.zeros((1, 1, 4, 4), np.float32))
    assert (images == 1.0).all()


def test_images_that_are_not_finite_are_refused(model: TinyDiT) -> None:
    made, _ = decoder(model, decoder_spec((2, 2)))
    latents = np.zeros((2, 1, 4, 4), np.float32)
    latents[1, 0, 3, 3] = np.nan
    with pytest.raises(EngineError, match="The decoded images hold NaN or infinite values"):
        made.images(latents)


def test_it_stops_between_two_tiles(model: TinyDiT) -> None:
    made, session = decoder(model, decoder_spec((2, 2)))
    with pytest.raises(SamplingCancelledError, match="Cancelled at tile 6 of 9"):
        made.images(np.zeros((1, 1, 4, 4), np.float32), cancelled=lambda: session.launches == 5)
    assert session.launches == 5


@pytest.mark.parametrize(("frames", "sizes"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (5, [5])])
def test_chunks_make_a_clip_and_no_clip_shares_one(model: TinyDiT, frames: int, sizes: list[int]) -> None:
    """The decoder here tells what it was given together: every pixel is the mean over its chunk."""
    spec, backend, seen = decoder_spec((2, 4), frames=frames), FakeBackend({}), []

    def mixed(tensors: Mapping[str, Array]) -> dict[str, Array]:
        seen.append(len(tensors["latents"]))
        pixels = enlarged(tensors["latents"])
        return {"images": np.broadcast_to(pixels.mean(axis=0), pixels.shape)}

    session = FakeSession(decode_spec(model.spec, spec), mixed, backend)  # type: ignore[arg-type]
    latents = np.random.default_rng(0).standard_normal((2, 1, 5, 4, 4), np.float32)
    told: list[int] = []
    clips = Decoder(spec, session, backend).images(latents, progress=lambda what, done, total: told.append(total))
    assert clips.shape == (2, 5, 3, 8, 8)
    tiles = 3  # two rows of 4, that share one at least
    assert seen == [size for _ in latents for size in sizes for _ in range(tiles)]
    assert told == [2 * tiles * len(sizes)] * (2 * tiles * len(sizes) + 1)
    for clip, of_clip in zip(clips, latents, strict=True):
        single = enlarged(of_clip.swapaxes(0, 1))
        chunks = np.split(single, np.cumsum(sizes)[:-1])
        expected = np.concatenate([np.broadcast_to(chunk.mean(axis=0), chunk.shape) for chunk in chunks])
        np.testing.assert_allclose(clip, expected, rtol=1e-5, atol=1e-6)


def test_latents_smaller_than_a_tile_are_decoded_whole_and_larger_ones_in_tiles(model: TinyDiT) -> None:
    varying = replace(model.spec, latents=replace(model.spec.latents, smallest=(2, 4), largest=(12, 12)))
    spec, backend = decoder_spec((4, 4)), FakeBackend({})
    decode = decode_spec(varying, spec)
    assert decode.inputs[0].shape == (1, 1, TILE_HEIGHT, 4)
    assert decode.ranges == ((TILE_HEIGHT, 2, 4), (IMAGE_HEIGHT, 4, 8))
    session = FakeSession(decode, lambda tensors: {"images": enlarged(np.asarray(tensors["latents"]))}, backend)
    made = Decoder(spec, session, backend)
    launches = {(2, 4): 1, (4, 4): 1, (8, 4): 3, (2, 12): 4}
    for (height, width), expected in launches.items():
        latents = np.random.default_rng(height).standard_normal((1, 1, height, width), np.float32)
        before = session.launches
        np.testing.assert_allclose(made.images(latents), enlarged(latents), rtol=1e-5, atol=1e-6)
        assert session.launches - before == expected


def test_it_stops_between_two_chunks(model: TinyDiT) -> None:
    made, session = decoder(model, decoder_spec((4, 4), frames=2))
    with pytest.raises(SamplingCancelledError, match="Cancelled at tile 3 of 3"):
        made.images(np.zeros((1, 1, 5, 4, 4), np.float32), cancelled=lambda: session.launches == 2)
    assert session.launches == 2


# --- In a pipeline -----------------------------------------------------------------------------------------------


def with_decoder(path: Path, model: TinyDiT, spec: DecoderSpec) -> Path:
    bundle = open_bundle(write_bundle(path, model))
    file = f"parts/{DECODE_PART}.onnx"
    (path / file).write_text(DECODE_PART)
    part = PartRecord(spec=decode_spec(model.spec, spec), onnx=file, artefact=file, build_seconds=0.0)
    manifest = bundle.manifest
    changes = {
        "decoder": spec,
        "parts": {**manifest.parts, DECODE_PART: part},
        "files": {**manifest.files, file: file_record(path / file)},
    }
    (path / MANIFEST_NAME).write_text(manifest.model_copy(update=changes).model_dump_json())
    return path


def test_a_pipeline_opens_the_decoder_when_it_is_asked_for(model: TinyDiT, tmp_path: Path) -> None:
    path = with_decoder(tmp_path / "bundle", model, decoder_spec((3, 4)))
    backend = FakeBackend.of(model)
    backend.functions = {**backend.functions, DECODE_PART: lambda tensors: {"images": enlarged(tensors["latents"])}}  # type: ignore[arg-type]
    latents = np.random.default_rng(1).standard_normal((2, 1, 4, 4), np.float32)
    with Pipeline.open(path, backend=backend) as pipeline:
        assert DECODE_PART not in backend.sessions
        for _ in range(2):
            np.testing.assert_allclose(pipeline.decode(latents), enlarged(latents), rtol=1e-5, atol=1e-6)
        session = backend.sessions[DECODE_PART]
        with pytest.raises(RequestError, match=r"latents has shape \(2, 1, 4, 3\)"):
            pipeline.decode(latents[..., :3])
    assert session.closed
    with pytest.raises(EngineError, match="closed"):
        pipeline.decode(latents)


def test_a_bundle_without_a_decoder_says_how_to_get_one(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match=r"holds no decoder. Keep latents, or rebuild it with: .*--vae PATH"):
        pipeline.decode(np.zeros((1, 1, 4, 4), np.float32))


@pytest.mark.parametrize(
    ("spec", "other", "message"),
    [
        (decoder_spec((2, 2)), decoder_spec((4, 4)), "decoder says what part decode does, which the bundle has not"),
        (decoder_spec((8, 4)), None, "decoder has tiles of 8 .* allowed are tiles up to the latents' 4"),
        (decoder_spec((2, 2), overlap=2), None, "tiles of 2 with an overlap of 2"),
    ],
)
def test_a_decoder_that_does_not_fit_its_bundle_is_refused(
    model: TinyDiT, tmp_path: Path, spec: DecoderSpec, other: DecoderSpec | None, message: str
) -> None:
    path = with_decoder(tmp_path / "bundle", model, spec)
    if other is not None:
        text = (path / MANIFEST_NAME).read_text()
        (path / MANIFEST_NAME).write_text(text.replace('"tile":[2,2]', '"tile":[4,4]'))
    with pytest.raises(BundleError, match=message):
        open_bundle(path)

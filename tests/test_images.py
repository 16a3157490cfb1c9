"""Images to latents and back: PIL, files, bytes, arrays, VAEs, and what is no image."""

import io

import datasets
import numpy
import pytest
import torch
from diffusers.utils import load_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_diffusion import Diffusion, autoencoder, dit, from_vectors, images, latents_of, scheduler_of, seed, vectors

from sysdag.components.diffusion.images import read_pixels
from sysdag.errors import DataError


def png(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def test_an_image_is_observed_in_every_form_alike(tmp_path):
    component = from_vectors()
    levels = numpy.arange(64, dtype=numpy.uint8).reshape(8, 8) * 4
    image = Image.fromarray(levels)
    image.save(tmp_path / "image.png")
    array = levels[None].astype(numpy.float64) / 127.5 - 1
    forms = [image, str(tmp_path / "image.png"), tmp_path / "image.png", png(image), array, torch.as_tensor(array)]
    for draw in component.observe(forms):
        assert draw.record["latents"].dtype == numpy.float32
        numpy.testing.assert_allclose(draw.record["latents"], array, atol=1e-6)
        assert numpy.array_equal(numpy.asarray(draw.value), levels)
        assert draw.log_prob is None
    assert component.key(component.observe([image])[0]) == component.key(component.observe([png(image)])[0])
    assert component.key(component.observe([image])[0]) != component.key(component.observe([image.rotate(90)])[0])


def test_observing_a_sample_gives_it_back_up_to_8_bits():
    component = from_vectors()
    draw = component.sample(vectors(1), generator=seed(0))[0]
    again = component.observe([draw.value])[0]
    numpy.testing.assert_allclose(again.record["latents"], draw.record["latents"].clip(-1, 1), atol=1 / 255 + 1e-6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Image.new("L", (8, 9)), r"8x8 \(width x height\) with 1 channel.*mode L, got 8x9 mode L"),
        (Image.new("RGB", (8, 8)), "got 8x8 mode RGB"),
        (b"", "bytes that PIL cannot decode"),
        (b"\x89PNG\r\n\x1a\n", "cannot decode"),
        ("no/such/file.png", "the file 'no/such/file.png', which does not exist"),
        ("nul\0byte", "cannot decode"),
        (png(Image.new("L", (8, 8)))[:-30], "cannot decode"),
        (png(Image.new("L", (16, 16)), "JPEG"), "got 16x16 mode L"),
        (torch.zeros(8, 8), r"of shape \(1, 8, 8\) in \[-1, 1\], got an array of torch.float32 of shape \(8, 8\)"),
        (numpy.zeros((1, 8, 8), numpy.uint8), "got an array of uint8"),
        (torch.zeros(1, 8, 8, dtype=torch.long), "torch.int64"),
        (torch.full((1, 8, 8), 1.5), "got values from 1.5 to 1.5"),
        (torch.full((1, 8, 8), float("nan")), "not finite"),
        (17, "got int 17"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_image_of_the_model_is_named(value, message):
    with pytest.raises(DataError, match=message) as caught:
        from_vectors().observe([images(1)[0], value])
    assert caught.value.element == 1


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]), st.integers(0, 400), st.binary(max_size=12))
def test_damaged_files_raise_nothing_but_data_errors(kind, place, garbage):
    raw = png(Image.fromarray(numpy.arange(64, dtype=numpy.uint8).reshape(8, 8)), kind)
    place %= len(raw)
    component = _IMAGES
    for damaged in (raw[:place], raw[:place] + garbage + raw[place + len(garbage) :], garbage):
        try:
            draws = component.observe([damaged])
        except DataError:
            continue
        assert draws[0].record["latents"].shape == (1, 8, 8)


_IMAGES = from_vectors()


def turned(orientation, size=(24, 16)):
    """A JPEG whose EXIF data say how it is looked at."""
    image = Image.effect_noise(size, 80).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_datasets_and_diffusers_turn_them(orientation, tmp_path):
    raw = turned(orientation)
    (tmp_path / "photo.jpg").write_bytes(raw)
    ours = read_pixels(raw, (3, None, None))
    by_diffusers = load_image(str(tmp_path / "photo.jpg"))
    by_datasets = datasets.Image(mode="RGB").decode_example({"path": None, "bytes": raw})
    for own in (by_diffusers, by_datasets):
        expected = torch.from_numpy(numpy.array(own, dtype=numpy.float32)).permute(2, 0, 1) / 127.5 - 1
        assert torch.equal(ours, expected)
    height, width = (24, 16) if orientation > 4 else (16, 24)
    for value in (str(tmp_path / "photo.jpg"), Image.open(io.BytesIO(raw)), by_datasets):
        assert torch.equal(read_pixels(value, (3, height, width)), ours)  # each is turned once
    with pytest.raises(DataError, match=f"got {width}x{height} mode RGB"):
        read_pixels(raw, (3, width, height))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA"])
def test_modes_are_converted_as_datasets_and_diffusers_do(mode):
    colours = Image.effect_noise((8, 8), 90).convert("RGB")
    colours = Image.merge("RGB", [colours.getchannel(0).rotate(90 * turn) for turn in range(3)])
    image = colours.convert("P" if mode == "PA" else "L" if mode == "LA" else mode).convert(mode)
    assert image.mode == mode
    expected = numpy.array(load_image(image), dtype=numpy.float32)
    ours = read_pixels(image, (3, 8, 8)).permute(1, 2, 0)
    numpy.testing.assert_allclose(ours, expected / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "channels", "message"),
    [
        (Image.new("I;16", (8, 8)), 3, "mode RGB, got 8x8 mode I;16"),
        (Image.new("I", (8, 8)), 3, "got 8x8 mode I"),
        (Image.new("F", (8, 8)), 3, "got 8x8 mode F"),
        (Image.new("LAB", (8, 8)), 3, "got 8x8 mode LAB"),
        (Image.new("RGBA", (8, 8), (9, 9, 9, 254)), 3, "opaque image, got Image of mode RGBA with transparent pixels"),
        (Image.new("LA", (8, 8), (9, 0)), 1, "transparent pixels; paste it onto the background"),
        (Image.new("CMYK", (8, 8)), 1, "mode L, got 8x8 mode CMYK"),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_modes_whose_content_would_be_lost_are_refused(image, channels, message):
    with pytest.raises(DataError, match=message):
        read_pixels(image, (channels, 8, 8))


def test_a_palette_with_a_transparent_colour_is_refused():
    image = Image.effect_noise((8, 8), 90).convert("P")
    image.info["transparency"] = image.getpixel((0, 0))
    with pytest.raises(DataError, match="mode P with transparent pixels"):
        read_pixels(image, (3, 8, 8))


def test_images_of_models_that_draw_no_image_are_refused():
    component = Diffusion(dit(), scheduler=scheduler_of("epsilon"))
    with pytest.raises(DataError, match="1 or 3 channels, but this model draws 2"):
        component.observe([Image.new("L", (4, 4))])
    assert component.observe([torch.full((2, 4, 4), 7.0)])[0].record["latents"].max() == 7


@pytest.mark.parametrize("normalised", [False, True])
def test_vae_encodes_by_its_mode_and_decodes(normalised):
    extra = {"latents_mean": [0.3], "latents_std": [1.7], "shift_factor": None} if normalised else {}
    vae = autoencoder(**extra)
    component = from_vectors(vae=vae)
    pixels = images(2, (3, 16, 16))
    draws = component.observe(pixels)
    mode = vae.encode(torch.stack(pixels)).latent_dist.mode().detach()
    expected = (mode - 0.3) * 0.4 / 1.7 if normalised else (mode - 0.2) * 0.4
    torch.testing.assert_close(latents_of(draws), expected, rtol=1e-4, atol=1e-5)
    assert draws[0].value.mode == "RGB"
    assert draws[0].value.size == (16, 16)

    drawn = component.sample(vectors(2), generator=seed(0))
    latents = latents_of(drawn)
    unscaled = latents / 0.4 * 1.7 + 0.3 if normalised else latents / 0.4 + 0.2
    decoded = vae.decode(unscaled).sample.detach()
    levels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    for place in range(2):
        difference = torch.as_tensor(numpy.asarray(drawn[place].value).astype(int)) - levels[place]
        assert difference.abs().max() <= 1
    with pytest.raises(DataError, match=r"16x16 .* mode RGB, got 8x8"):
        component.observe([Image.new("RGB", (8, 8))])
    noise = component.noise(draws, seed(0))
    assert component.score(vectors(2), draws, noise).requires_grad

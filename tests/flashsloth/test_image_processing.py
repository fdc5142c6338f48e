import io
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from flashsloth.image_processing_flashsloth import (
    IMAGE_FORMATS,
    WITH_GIF,
    FlashSlothImageProcessor,
    ImageError,
    decode_image,
    normalize_pixels,
    to_rgb,
)
from tests.memory import peak_growth
from tests.oversize import oversize

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_IMAGES = ["image0_384x384", "image1_640x427", "image2_200x500"]


def encoded(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(width=80, height=60):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reason(data, **options):
    with pytest.raises(ImageError) as caught:
        decode_image(data, **options)
    return caught.value.reason


@pytest.mark.parametrize("name", GOLDEN_IMAGES)
def test_pixels_are_those_of_the_published_preprocessing(name):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    image = decode_image((GOLDEN / f"{name}.png").read_bytes())
    base = FlashSlothImageProcessor()([image])["pixel_values"]
    tiles = FlashSlothImageProcessor(tiling="hd")([image])["pixel_values"]
    assert base.shape == (1, 1, 3, 384, 384)
    assert tiles.shape == (1, 5, 3, 384, 384)
    torch.testing.assert_close(base[0, 0, :, ::8, ::8], golden["pixel_values_every8"], atol=1e-5, rtol=0)
    torch.testing.assert_close(tiles[0, :, :, ::8, ::8], golden["hd_pixel_values_every8"], atol=1e-5, rtol=0)
    torch.testing.assert_close(tiles[0].mean((1, 2, 3)), golden["hd_tile_means"], atol=1e-5, rtol=0)


def test_tiles_come_in_reading_order_and_the_padding_is_grey():
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    tiles = FlashSlothImageProcessor(tiling="hd", size=50).to_uint8(image)
    assert tiles.shape == (5, 3, 50, 50)
    assert tiles.dtype == np.uint8
    # The picture fills rows 50 to 149 of a 200 x 200 square, so rows 25 to 74 of the 100 x 100 that is cut in four.
    grey, red, blue = [127, 127, 127], [255, 0, 0], [0, 0, 255]
    upper_and_lower_row = [[tile[:, 5, 20].tolist(), tile[:, 45, 20].tolist()] for tile in tiles[1:]]
    assert upper_and_lower_row == [[grey, red], [grey, blue], [red, grey], [blue, grey]]


def test_stored_pixels_normalised_later_are_the_pixel_values():
    processor = FlashSlothImageProcessor(size=126)
    stored = torch.from_numpy(processor.to_uint8(noise()))
    assert torch.equal(normalize_pixels(stored), processor(noise())["pixel_values"][0])
    assert normalize_pixels(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_settings_survive_saving(tmp_path):
    FlashSlothImageProcessor(tiling="hd", size=126).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (saved["tiling"], saved["size"]) == ("hd", 126)
    loaded = FlashSlothImageProcessor.from_pretrained(tmp_path)
    assert (loaded.tiling, loaded.size, loaded.num_tiles) == ("hd", 126, 5)


def test_wrong_settings_and_inputs_are_refused():
    with pytest.raises(ValueError, match="'quarters'"):
        FlashSlothImageProcessor(tiling="quarters")
    with pytest.raises(ValueError, match="size is 0"):
        FlashSlothImageProcessor(size=0)
    with pytest.raises(TypeError, match="image 1 is a bytes"):
        FlashSlothImageProcessor()([noise(), b"png"])


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_every_accepted_format_decodes(image_format):
    image = decode_image(encoded(noise(), image_format))
    assert (image.mode, image.size) == ("RGB", (80, 60))


@pytest.mark.parametrize("percent", [30, 60, 95])
@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_a_download_that_broke_off_is_truncated(image_format, percent):
    data = encoded(noise(), image_format)
    assert reason(data[: len(data) * percent // 100]) == "image_truncated"


def test_the_format_of_iphones_is_named() -> None:
    with pytest.raises(ImageError, match="image_format_not_allowed: HEIF; accepted: JPEG, PNG"):
        decode_image(b"\0\0\0\x1cftypheic" + bytes(100))


@pytest.mark.parametrize("image_format", ["GIF", "PPM", "ICO"])
def test_other_formats_are_refused_by_name(image_format):
    with pytest.raises(ImageError, match=f"image_format_not_allowed: {image_format}; accepted: JPEG, PNG"):
        decode_image(encoded(noise(), image_format))


def test_a_gif_gives_its_first_frame_where_it_is_accepted():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data, formats=(*IMAGE_FORMATS, "GIF")).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("data", [b"hello", b"<p>", bytes(1000), b"\xff\xd8\xff\xd9"])
def test_bytes_that_are_no_image(data):
    assert reason(data) == "image_undecodable"


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("html", b"<!DOCTYPE html>\n<html><body>403 Forbidden</body></html>"),
        ("html", b"\xef\xbb\xbf  <HTML><head></head></HTML>"),
        ("xml", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
        ("svg", b"<svg xmlns='http://www.w3.org/2000/svg'></svg>"),
        ("svg", b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg width="8" height="8"></svg>'),
        ("pdf", encoded(noise(), "PDF")),
        ("eps", encoded(noise(), "EPS")),
        ("eps", b"\xc5\xd0\xd3\xc6" + bytes(26)),
    ],
)
def test_a_document_that_bears_an_images_name_is_told_by_its_kind(kind, data):
    with pytest.raises(ImageError, match=f"^image_is_{kind}: {len(data)} bytes of {kind.upper()}; accepted: JPEG, PNG"):
        decode_image(data)


def test_a_pointer_of_git_lfs_says_how_to_fetch_the_image():
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    with pytest.raises(ImageError, match=r"^image_is_lfs_pointer: a pointer of Git LFS, not the image: git lfs pull"):
        decode_image(pointer)


def test_the_transparent_grey_of_16_bits_shows_grey():
    samples = np.array([[0, 7, 65535, 258]] * 4, np.uint16)
    picture = Image.fromarray(samples)
    opaque, open_at_7 = (decode_image(encoded(picture, "PNG", **each)) for each in ({}, {"transparency": 7}))
    assert [opaque.getpixel((x, 0)) for x in range(4)] == [(0,) * 3, (0,) * 3, (255,) * 3, (1,) * 3]
    assert [open_at_7.getpixel((x, 0)) for x in range(4)] == [(0,) * 3, (127,) * 3, (255,) * 3, (1,) * 3]


def test_no_bytes():
    assert reason(b"") == "image_empty"


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (3, 50), (1001, 5), (5, 1001)])
def test_shapes_with_nothing_to_see(size):
    assert reason(encoded(Image.new("L", size))) == "image_bad_size"


@pytest.mark.parametrize("size", [(8000, 8000), (12000, 8000), (14000, 14000), (12001, 100)])
def test_large_pictures_are_refused_from_their_header_without_a_warning(size):
    # One bit a pixel: a few kilobytes that would decode to hundreds of megabytes. 12000 x 8000 is where Pillow warns,
    # 14000 x 14000 where it raises its own error.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(encoded(Image.new("1", size))) == "image_too_large"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "BMP", "TIFF", "GIF"])
def test_a_header_of_60000_pixels_a_side_is_refused_in_every_format(image_format):
    assert reason(oversize(image_format, 60_000, 60_000), formats=WITH_GIF) == "image_too_large"


def test_refusing_from_the_header_takes_no_memory():
    large = encoded(Image.new("1", (12_000, 12_000)))  # 144 megapixels in 18 kilobytes
    hostile = [
        large,
        oversize("PNG", 60_000, 60_000),
        oversize("JPEG", 60_000, 60_000),
        oversize("BMP", 50_000, 50_000),
    ]
    hostile += [encoded(Image.new("L", size)) for size in ((20_000, 1), (1, 1))]
    for data in hostile:
        assert peak_growth(lambda data=data: reason(data)) < 2**20
    # What is decoded goes far over the bound, so the bound can fail.
    assert peak_growth(lambda: decode_image(large, max_pixels=12_000**2)) > 144_000_000


def test_the_pixel_limit_names_both_numbers():
    with pytest.raises(ImageError, match="80x60 = 4800 pixels; at most 4799"):
        decode_image(encoded(noise()), max_pixels=4799)
    assert decode_image(encoded(noise()), max_pixels=4800).size == (80, 60)


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
def test_flipped_bytes_never_raise_anything_else():
    random = np.random.default_rng(0)
    for image_format in IMAGE_FORMATS:
        data = encoded(noise(), image_format)
        for _ in range(40):
            broken = bytearray(data)
            for position in random.integers(0, min(len(data), 400), 4):
                broken[position] = random.integers(0, 256)
            try:
                assert decode_image(bytes(broken)).mode == "RGB"
            except ImageError as error:
                assert error.reason.startswith("image_")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_picture_is_turned_upright(image_format):
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be turned 90 degrees clockwise
    upright = decode_image(encoded(image, image_format, exif=exif))
    assert upright.size == (32, 64)
    top, bottom = upright.getpixel((16, 8)), upright.getpixel((16, 56))
    assert top[0] > 200 > top[2]
    assert bottom[2] > 200 > bottom[0]


@pytest.mark.parametrize("orientation", range(10))
def test_all_orientations_turn_as_pillow_turns_them(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(expected))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "block", [b"garbage" * 3, b"", b"II*\0", b"II*\0\xff\xff\xff\x7f", b"II*\0\x08\0\0\0\x10\0\x12\x01"]
)
def test_an_exif_block_that_cannot_be_read_is_none(image_format, block):
    options = {"lossless": True} if image_format == "WEBP" else {}
    image = noise()
    with warnings.catch_warnings(action="ignore"):
        broken = decode_image(encoded(image, image_format, exif=b"Exif\0\0" + block, **options))
    assert np.array_equal(broken, decode_image(encoded(image, image_format, **options)))


def test_an_odd_exif_block_does_not_cost_the_picture():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a bus"
    data = encoded(noise(), "JPEG", exif=exif)
    start = data.index(b"Exif\0\0")
    end = start - 2 + int.from_bytes(data[start - 2 : start])  # the segment's length precedes it
    for position in range(start + 6, end):
        for value in (0, 127, 255):
            damaged = bytearray(data)
            damaged[position] = value
            with warnings.catch_warnings(action="ignore"):
                assert sorted(decode_image(bytes(damaged)).size) == [60, 80]


def test_transparency_shows_grey_and_not_the_hidden_colour():
    clear_red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half_white = Image.new("RGBA", (8, 8), (255, 255, 255, 128))
    clear_white_grey = Image.new("LA", (8, 8), (255, 0))
    assert decode_image(encoded(clear_red)).getpixel((0, 0)) == (127, 127, 127)
    assert decode_image(encoded(clear_red, "WEBP", lossless=True, exact=True)).getpixel((0, 0)) == (127, 127, 127)
    assert decode_image(encoded(half_white)).getpixel((0, 0)) == (191, 191, 191)
    assert decode_image(encoded(clear_white_grey)).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
def test_a_colour_declared_transparent_shows_grey(mode):
    image = Image.new(mode, (8, 8), 0)
    if mode == "P":
        image.putpalette([255, 0, 0])
    data = encoded(image, transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert decode_image(data).getpixel((0, 0)) == (127, 127, 127)


def test_palette_one_bit_and_cmyk():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert decode_image(encoded(palette)).getpixel((0, 0)) == (10, 200, 30)
    assert decode_image(encoded(Image.new("1", (8, 8), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")).getpixel((0, 0)) == (255, 0, 0)
    red, green, blue = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((0, 0))
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_saturated(image_format):
    ramp = np.array([[0, 257, 32768, 65535]] * 4, np.uint16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(ramp), image_format)))
    assert decoded[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_samples_without_a_range_are_refused(dtype):
    image = Image.fromarray(np.zeros((8, 8), dtype))
    assert reason(encoded(image, "TIFF")) == "image_undecodable"
    with pytest.raises(ImageError, match="no defined range"):
        to_rgb(image)


def test_the_error_crosses_processes():
    error = pickle.loads(pickle.dumps(ImageError("image_empty", "0 bytes")))
    assert (error.reason, error.detail, str(error)) == ("image_empty", "0 bytes", "image_empty: 0 bytes")

"""Files written by hand, sample by sample: what a PNG hides and which way round a TIFF is."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from flashsloth.image_modes import ImageError, to_rgb
from flashsloth.image_processing_flashsloth import FlashSlothImageProcessor, decode_image

GREY = 127
GREY_PNG, RGB_PNG, PALETTE_PNG = 0, 2, 3  # the format's colour types
BLACK_IS_ZERO, WHITE_IS_ZERO = 1, 0
PLAIN, DEFLATE = 1, 8


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(samples, bits, colour, before=b"", after=b""):
    """A PNG of samples[H, W] or [H, W, 3], with chunks before and after its pixels."""
    rows = samples.reshape(len(samples), -1)
    if bits == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        packed = [np.packbits((row[:, None] >> np.arange(bits)[::-1]) & 1).tobytes() for row in rows]
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in packed))
    parts = [chunk(b"IHDR", header), before, chunk(b"IDAT", pixels), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def hiding(*samples):
    return chunk(b"tRNS", struct.pack(f">{len(samples)}H", *samples))


def tiff(samples, bits, photometric, compression=PLAIN, order="<", orientation=1):
    """A grey TIFF of samples[H, W]; without the tag of its photometric interpretation where that is None."""
    if bits == 16:
        data = samples.astype(f"{order}u2").tobytes()
    else:
        data = b"".join(np.packbits((row[:, None] >> np.arange(bits)[::-1]) & 1).tobytes() for row in samples)
    data = zlib.compress(data) if compression == DEFLATE else data
    height, width = samples.shape
    tags = {256: width, 257: height, 258: bits, 259: compression, 262: photometric, 273: None, 274: orientation}
    tags |= {277: 1, 278: height, 279: len(data)}
    tags = {tag: value for tag, value in tags.items() if tag != 262 or value is not None}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the pixels start: behind this table
    table = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return start + struct.pack(f"{order}IH", 8, len(tags)) + table + bytes(4) + data


def pixels(data):
    return np.asarray(decode_image(data))


def in_three(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=2)


def grey_samples(bits):
    """8 x 8 samples, with the least and the greatest."""
    samples = np.random.default_rng(bits).integers(0, 2**bits, 64)
    samples[[0, 1]] = (0, 2**bits - 1)
    return samples.reshape(8, 8)


def in_8_bits(samples, bits):
    return np.rint(samples * (255 / (2**bits - 1)))


def rgb16_samples():
    """8 x 8 colours; the first has neighbours that differ from it in one byte of one sample."""
    samples = np.random.default_rng(16).integers(0, 2**16, (8, 8, 3))
    samples[0, :7] = (0x1234, 0x5678, 0x9ABC)
    for place, (channel, other) in enumerate([(0, 0x1235), (0, 0x1334), (1, 0x5600), (1, 0x0078), (2, 0x9ABB)]):
        samples[0, place + 1, channel] = other
    return samples  # the seventh is the first again


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_every_grey_sample_of_a_png_can_be_the_hidden_one(bits):
    samples = grey_samples(bits)
    for hidden in np.unique(samples):
        expected = np.where(samples == hidden, GREY, in_8_bits(samples, bits))
        seen = pixels(png(samples, bits, GREY_PNG, hiding(hidden)))
        assert np.array_equal(seen, in_three(expected)), hidden


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_grey_png_that_hides_nothing_shows_everything(bits):
    samples = grey_samples(bits)
    assert np.array_equal(pixels(png(samples, bits, GREY_PNG)), in_three(in_8_bits(samples, bits)))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_palette_hides_by_the_entry(bits):
    entries = np.random.default_rng(bits).integers(0, 256, (2**bits, 3), dtype=np.uint8)
    alphas = np.full(2**bits, 255, np.uint8)
    alphas[1] = 0
    samples = grey_samples(bits)
    samples[3, 3] = 1
    before = chunk(b"PLTE", entries.tobytes()) + chunk(b"tRNS", alphas.tobytes())
    expected = np.where((samples == 1)[..., None], GREY, entries[samples])
    assert np.array_equal(pixels(png(samples, bits, PALETTE_PNG, before)), expected)


def test_the_hidden_colour_of_8_bits():
    samples = np.random.default_rng(8).integers(0, 256, (8, 8, 3))
    samples[2, 3:6] = (10, 20, 30)
    samples[2, 4, 1] = 21
    expected = samples.copy()
    expected[2, [3, 5]] = GREY
    assert np.array_equal(pixels(png(samples, 8, RGB_PNG, hiding(10, 20, 30))), expected)
    # The chunk has 16 bits for each sample, of which those of the file's depth count.
    assert np.array_equal(pixels(png(samples, 8, RGB_PNG, hiding(266, 20, 30))), expected)


def test_the_hidden_colour_of_16_bits_is_compared_in_both_bytes():
    samples = rgb16_samples()
    expected = samples >> 8
    assert np.array_equal(pixels(png(samples, 16, RGB_PNG)), expected)
    expected[0, [0, 6]] = GREY
    assert np.array_equal(pixels(png(samples, 16, RGB_PNG, hiding(0x1234, 0x5678, 0x9ABC))), expected)


def test_the_hidden_colour_of_16_bits_in_a_picture_with_rows_that_are_filtered():
    # Neighbours of one colour, that a writer would filter: Pillow undoes it for the low bytes as for the high ones.
    samples = np.repeat(rgb16_samples(), 3, axis=1)
    differences = np.diff(samples.astype(">u2").view(np.uint8).reshape(8, 24, 6), axis=1, prepend=0)
    rows = b"".join(b"\1" + row.astype(np.uint8).tobytes() for row in differences)
    plain = png(samples, 16, RGB_PNG, hiding(0x1234, 0x5678, 0x9ABC))
    filtered = plain[: plain.index(b"IDAT") - 4] + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert filtered != plain
    expected = samples >> 8
    expected[0, [0, 1, 2, 18, 19, 20]] = GREY
    assert np.array_equal(pixels(filtered), expected)
    assert np.array_equal(pixels(plain), expected)


@pytest.mark.parametrize("bits", [2, 16])
def test_a_picture_that_the_caller_opened_hides_the_same_time_and_again(bits, tmp_path):
    if bits == 2:
        data = png(np.full((8, 8), 3), 2, GREY_PNG, hiding(3))
    else:
        data = png(np.full((8, 8, 3), 700), 16, RGB_PNG, hiding(700, 700, 700))
    (tmp_path / "image.png").write_bytes(data)
    for file in (io.BytesIO(data), tmp_path / "image.png"):
        image = Image.open(file)
        for _ in range(2):
            assert np.unique(to_rgb(image)).tolist() == [GREY]
            assert np.unique(FlashSlothImageProcessor(size=4).to_uint8(image)).tolist() == [GREY]


def test_a_hidden_colour_of_16_bits_that_cannot_be_compared_is_refused():
    samples = rgb16_samples()
    late = png(samples, 16, RGB_PNG, after=hiding(0x1234, 0x5678, 0x9ABC))
    with pytest.raises(ImageError, match=r"^image_undecodable: the hidden colour") as caught:
        decode_image(late)
    assert caught.value.reason == "image_undecodable"
    loaded = Image.open(io.BytesIO(png(samples, 16, RGB_PNG, hiding(0x1234, 0x5678, 0x9ABC))))
    loaded.load()
    with pytest.raises(ImageError, match=r"^image_undecodable: the hidden colour"):
        to_rgb(loaded)


def test_a_png_that_hides_a_colour_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be turned 90 degrees clockwise
    block = chunk(b"eXIf", exif.tobytes()[6:])
    grey, rgb = grey_samples(4), rgb16_samples()
    hidden = np.where(grey == 5, GREY, in_8_bits(grey, 4))
    assert np.array_equal(pixels(png(grey, 4, GREY_PNG, hiding(5) + block)), in_three(np.rot90(hidden, -1)))
    hidden = rgb >> 8
    hidden[0, [0, 6]] = GREY
    data = png(rgb, 16, RGB_PNG, hiding(0x1234, 0x5678, 0x9ABC), after=block)
    assert np.array_equal(pixels(data), np.rot90(hidden, -1))


@pytest.mark.parametrize("compression", [PLAIN, DEFLATE])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_tiff_whose_zero_is_white_is_the_right_way_round(bits, compression):
    samples = grey_samples(bits)
    black, white = (pixels(tiff(samples, bits, zero, compression)) for zero in (BLACK_IS_ZERO, WHITE_IS_ZERO))
    assert np.array_equal(black, in_three(in_8_bits(samples, bits)))
    assert np.array_equal(white, in_three(in_8_bits(2**bits - 1 - samples, bits)))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_that_does_not_say_is_the_same_way_round_in_8_and_16_bits(bits):
    samples = grey_samples(bits)
    assert np.array_equal(pixels(tiff(samples, bits, None)), in_three(in_8_bits(2**bits - 1 - samples, bits)))


@pytest.mark.parametrize("compression", [PLAIN, DEFLATE])
def test_a_tiff_whose_zero_is_white_is_turned_upright(compression):
    samples = grey_samples(16)
    turned = in_three(np.rot90(in_8_bits(65535 - samples, 16), -1))
    data = tiff(samples, 16, WHITE_IS_ZERO, compression, orientation=6)
    assert np.array_equal(pixels(data), turned)
    image = Image.open(io.BytesIO(data))
    assert all(np.array_equal(np.asarray(to_rgb(image)), turned) for _ in range(2))


def test_16_bits_with_their_high_byte_first():
    samples = grey_samples(16)
    assert np.array_equal(pixels(tiff(samples, 16, BLACK_IS_ZERO, order=">")), in_three(in_8_bits(samples, 16)))
    with pytest.raises(ImageError, match=r"^image_undecodable"):  # Pillow does not know it; refused, and not guessed
        decode_image(tiff(samples, 16, WHITE_IS_ZERO, order=">"))


def test_12_bits_reach_from_black_to_white():
    samples = grey_samples(12)
    assert np.array_equal(pixels(tiff(samples, 12, BLACK_IS_ZERO)), in_three(in_8_bits(samples, 12)))
    with pytest.raises(ImageError, match=r"^image_undecodable"):  # as of 16 bits with their high byte first
        decode_image(tiff(samples, 12, WHITE_IS_ZERO))

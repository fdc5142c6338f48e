"""Files that are far more work to decode than their pixels are: refused, and real ones with much in them are not."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flashsloth.image_modes import ImageError
from flashsloth.image_processing_flashsloth import WITH_GIF, decode_image
from flashsloth.image_structure import check_structure

_MANY = 50_000


def encoded(image_format: str, side: int = 40, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side), 100).save(buffer, image_format, **options)
    return buffer.getvalue()


def with_scans(side: int, more: int) -> bytes:
    """A progressive JPEG, and the last of its scans so many times more."""
    data = encoded("JPEG", side, "L", progressive=True)
    last = data.rindex(b"\xff\xda")
    table = data.rfind(b"\xff\xc4", 0, last)
    again = data[table if table > data.rfind(b"\xff\xda", 0, last) else last : -2]
    return data[:-2] + again * more + data[-2:]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with(chunks: bytes) -> bytes:
    data = encoded("PNG")
    return data[:33] + chunks + data[33:]


def jpeg_with(segments: bytes) -> bytes:
    data = encoded("JPEG")
    return data[:2] + segments + data[2:]


def gif_with(extensions: bytes) -> bytes:
    data = encoded("GIF", mode="P")
    start = 13 + 3 * 2 ** ((data[10] & 7) + 1) * (data[10] >> 7)
    return data[:start] + extensions + data[start:]


def directory(tags: list[tuple[int, int, int, int]], before: bytes = b"", order: str = "<") -> bytes:
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(before))
    entries = b"".join(struct.pack(order + "HHII", *tag) for tag in tags)
    return head + before + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def tiff_of_tiles(side: int) -> bytes:
    """Each pixel a tile of its own, all of them the same byte."""
    count = side * side
    places = struct.pack("<I", 8) * count
    sizes = struct.pack("<I", 1) * count
    before = b"\x80" * 4 + places + sizes
    short = [(258, 8), (259, 1), (262, 1), (277, 1)]
    tags = [(256, 4, 1, side), (257, 4, 1, side), *((tag, 3, 1, value) for tag, value in short)]
    tags += [(322, 4, 1, 1), (323, 4, 1, 1), (324, 4, count, 12), (325, 4, count, 12 + len(places))]
    return directory(tags, before)


def exif(num_tags: int) -> bytes:
    return directory([(0x112, 3, 1, 6), *((1000 + tag, 7, 8, 8) for tag in range(num_tags))])


BOMBS: dict[str, Callable[[], bytes]] = {
    "scans of a JPEG": lambda: with_scans(40, 200),
    "scans of a large JPEG": lambda: with_scans(7000, 30),
    "segments of a JPEG": lambda: jpeg_with(b"\xff\xe5\0\2" * _MANY),
    "fill bytes of a JPEG": lambda: jpeg_with(b"\xff" * 2 * _MANY),
    "junk in a JPEG": lambda: jpeg_with(bytes(2 * _MANY)),
    "junk in a JPEG without a picture": lambda: b"\xff\xd8\xff\xe5\0\2" + bytes(2 * _MANY),
    "chunks of a PNG": lambda: png_with(chunk(b"teSt", b"") * _MANY),
    "pixels of a PNG in chunks": lambda: png_with(chunk(b"IDAT", b"") * 2 * _MANY),
    "profiles of a PNG": lambda: png_with(chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**20))) * 100),
    "extensions of a GIF": lambda: gif_with(b"!\xfe\1a\0" * _MANY),
    "blocks of a GIF": lambda: gif_with(b"!\xfe" + b"\1a" * 2 * _MANY + b"\0"),
    "junk in a GIF": lambda: gif_with(bytes(2 * _MANY)),
    "tiles of a TIFF": lambda: tiff_of_tiles(300),
    "tags of a TIFF": lambda: exif(_MANY),
    "EXIF in many segments of a JPEG": lambda: jpeg_with((b"\xff\xe1\xff\xf8Exif\0\0" + bytes(65528)) * 8),
}


def _not_to_be_called(*_: object, **__: object) -> None:
    pytest.fail("refused, but not before the work")


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_far_more_work_than_its_pixels_is_refused_before_it_is_done(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = BOMBS[name]()
    monkeypatch.setattr(Image, "open", _not_to_be_called)
    with pytest.raises(ImageError) as caught:
        decode_image(data, formats=WITH_GIF)
    assert caught.value.reason == "image_too_complex"
    assert " or more; at most " in caught.value.detail


REAL: dict[str, Callable[[], bytes]] = {
    "a progressive JPEG": lambda: encoded("JPEG", 500, progressive=True),
    "a large progressive JPEG": lambda: encoded("JPEG", 7000, "L", progressive=True),
    "a profile in 255 segments": lambda: jpeg_with(b"\xff\xe2\1\2ICC_PROFILE\0".ljust(260, b"\0") * 255),
    "a film behind a photo": lambda: encoded("JPEG") + np.random.default_rng(0).bytes(10**7),
    "markers in a comment": lambda: jpeg_with(b"\xff\xfe\xff\xfd" + b"\xff\xda" * 32765 + b"\0"),
    "a PNG in small chunks": lambda: png_with(chunk(b"tEXt", b"a\0b") * 500),
    "a TIFF in strips of a row": lambda: encoded("TIFF", 2000, tiffinfo={278: 1}),
    "a hundred tags": lambda: encoded("JPEG", exif=b"Exif\0\0" + exif(100)),
    "a GIF of many frames": lambda: encoded(
        "GIF", save_all=True, append_images=[Image.new("RGB", (40, 40), (n, 0, 0)) for n in range(200)]
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_what_real_files_have_is_taken(name: str) -> None:
    assert decode_image(REAL[name](), formats=WITH_GIF).mode == "RGB"


TOO_MANY_TAGS: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: png_with(chunk(b"eXIf", exif(_MANY))),
    "WebP": lambda: encoded("WEBP", exif=exif(_MANY)),
    "ImageMagick's PNG": lambda: png_with(
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n1\n" + exif(2000).hex().encode())
    ),
}


@pytest.mark.parametrize("name", TOO_MANY_TAGS)
def test_an_exif_block_of_too_many_tags_costs_neither_picture_nor_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TOO_MANY_TAGS[name]()
    monkeypatch.setattr(Image.Image, "getexif", _not_to_be_called)
    assert decode_image(data).mode == "RGB"


@pytest.mark.parametrize("order", ["<", ">"])
def test_tags_are_counted_in_either_byte_order(order: str) -> None:
    with pytest.raises(ImageError, match="90000 strips or tiles"):
        check_structure(directory([(273, 4, 90_000, 0)], order=order))


def test_tags_of_a_large_tiff_are_counted() -> None:
    head = b"II+\0" + struct.pack("<HHQ", 8, 0, 16)
    with pytest.raises(ImageError, match="90000 strips or tiles"):
        check_structure(head + struct.pack("<QHHQQ", 1, 324, 16, 90_000, 0))


def test_odd_tags_of_an_exif_block_fill_no_log() -> None:
    block = b"Exif\0\0" + directory([(1000 + tag, 7, 10**6, 8) for tag in range(50)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode_image(encoded("JPEG", exif=block))
    assert not caught


_HEADS = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b""]


@given(st.sampled_from(_HEADS), st.binary(max_size=200))
def test_nothing_else_is_raised_whatever_the_bytes(head: bytes, rest: bytes) -> None:
    try:
        check_structure(head + rest)
    except ImageError as error:
        assert error.reason == "image_too_complex"

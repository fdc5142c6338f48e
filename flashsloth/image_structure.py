"""How a file is put together, looked at before any decoder is: size in pixels does not bound the time of decoding.

A file of a few hundred kilobytes may repeat a scan of its JPEG, or name each of its pixels a tile of its TIFF, and keep
a decoder busy for minutes; nothing can interrupt one. So what real files have few of is counted here, at the cost of
some microseconds, and what has too many is refused. No length that a file claims is believed beyond its end.
"""

import re
import struct

import numpy as np

from .image_modes import ImageError

MAX_SCANS = 100  # of a JPEG; progressive ones have about 10
MAX_SCANNED_PIXELS = 1_000_000_000  # of all scans together, each of which passes over the whole picture, but for
_FEW_SCANS = 20  # of any: a picture that is too large even so is said to be that
MAX_PARTS = 1_000  # segments, chunks, tags or extensions: what holds no pixels
MAX_PIXEL_PARTS = 65_536  # chunks, strips or tiles: what does, of 8 kB in the PNG of 50 megapixels
MAX_PROFILES = 16  # of a PNG, which may have one; each is unpacked, to up to a megabyte
MAX_EXIF = 4  # segments of a JPEG that are read as one EXIF block; real ones have one
MAX_JUNK = 65_536  # bytes that belong to nothing, which are passed over one by one

_START_OF_SCAN, _EXIF = 0xDA, 0xE1
_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the markers whose segment says how large the picture is
_WITH_LENGTH = {*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE} - {0xC8}
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # what stands between is the scan

_TIFF = re.compile(rb"II\*\x00|MM\x00\*|MM\*\x00|II\x00\*|MM\x00\+|II\+\x00")
_STRIPS_OR_TILES = (273, 324)  # tags


def check_structure(data: bytes) -> None:
    """Raise `ImageError` (image_too_complex) for a file that is far more work to decode than its pixels are.

    Formats that are not known here are left to their decoders.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
    elif data.startswith(b"GIF8"):
        _check_gif(data)
    elif _TIFF.match(data):
        _check_tags(data)


def has_few_tags(block: bytes) -> bool:
    """Whether an EXIF block, which is a TIFF without a picture, has no more tags than real ones have."""
    try:
        _check_tags(block)
    except ImageError:
        return False
    return True


def _check_tags(data: bytes) -> None:
    """Of the first directory of a TIFF."""
    order = ">" if data.startswith(b"MM") else "<"
    is_big = b"+" in data[2:4]
    try:
        (start,) = struct.unpack_from(order + ("8xQ" if is_big else "4xL"), data)
        (num_tags,) = struct.unpack_from(order + ("Q" if is_big else "H"), data, start)
        size, first, entry = (20, 8, "HHQ") if is_big else (12, 2, "HHL")
        num_tags = min(num_tags, (len(data) - start - first) // size)
        _bound(num_tags, MAX_PARTS, "tags")
        for number in range(num_tags):
            tag, _, count = struct.unpack_from(order + entry, data, start + first + number * size)
            if tag in _STRIPS_OR_TILES:
                _bound(count, MAX_PIXEL_PARTS, "strips or tiles")
    except (struct.error, OverflowError):
        return  # it ends before its directory begins: the decoder says so


def _check_jpeg(data: bytes) -> None:
    position = 2
    num_pixels = num_segments = num_exif = junk = 0
    while found := _MARKER.search(data, position):
        marker, start = data[found.end() - 1], found.end()
        num_segments += 1
        junk += found.start() - position
        _bound(num_segments, MAX_PARTS, "segments")
        _bound(junk, MAX_JUNK, "bytes between its segments")
        num_exif += marker == _EXIF and data.startswith(b"Exif\0\0", start + 2)
        _bound(num_exif, MAX_EXIF, "segments of EXIF")
        if marker in _SIZES:
            height, width = _numbers(data, start + 3, ">HH")
            num_pixels = max(num_pixels, height * width)
        if marker == _START_OF_SCAN:
            break
        position = start + (_numbers(data, start, ">H")[0] if marker in _WITH_LENGTH else 0)
    else:
        _bound(len(data) - position, MAX_JUNK, "bytes behind its segments")
        return
    most = min(MAX_SCANS, max(_FEW_SCANS, MAX_SCANNED_PIXELS // max(num_pixels, 1)))
    # The pixels of a scan contain no marker, but what stands behind the end of the picture may: then they are counted.
    if _count_most(data, found.start()) > most:
        _bound(_count_scans(data, found.start()), most, f"scans of {num_pixels} pixels")


def _count_most(data: bytes, position: int) -> int:
    """As `_count_scans`, and what only looks like one: no fewer."""
    values = np.frombuffer(data, np.uint8, offset=position)
    markers = np.flatnonzero(values[:-1] == 0xFF)
    return int(np.count_nonzero(values[markers + 1] == _START_OF_SCAN))


def _count_scans(data: bytes, position: int) -> int:
    """Scans from the first one's marker, at `position`, to the end of the picture."""
    num_scans = 0
    while found := _AFTER_SCAN.search(data, position):
        marker, start = data[found.end() - 1], found.end()
        if marker == 0xD9:
            break
        num_scans += marker == _START_OF_SCAN
        position = start + (_numbers(data, start, ">H")[0] if marker in _WITH_LENGTH else 0)
    return num_scans


def _check_png(data: bytes) -> None:
    position = 8
    counts = {True: 0, False: 0}  # by whether they hold pixels
    num_profiles = 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">L4s", data, position)
        if kind == b"IEND":
            break
        holds_pixels = kind in (b"IDAT", b"fdAT", b"fcTL")
        counts[holds_pixels] += 1
        num_profiles += kind == b"iCCP"
        _bound(counts[holds_pixels], MAX_PIXEL_PARTS if holds_pixels else MAX_PARTS, "chunks")
        _bound(num_profiles, MAX_PROFILES, "colour profiles")
        position += 12 + length


def _check_gif(data: bytes) -> None:
    position = 13 + _palette_size(data[10] if len(data) > 10 else 0)
    num_extensions = num_blocks = junk = 0
    while position < len(data) and data[position] not in b",;":
        if data[position] != ord("!"):
            junk, position = junk + 1, position + 1
            _bound(junk, MAX_JUNK, "bytes between its parts")
            continue
        num_extensions, position = num_extensions + 1, position + 2
        _bound(num_extensions, MAX_PARTS, "extensions")
        while position < len(data) and data[position]:
            num_blocks, position = num_blocks + 1, position + 1 + data[position]
            _bound(num_blocks, MAX_PIXEL_PARTS, "blocks of extensions")
        position += 1


def _palette_size(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _numbers(data: bytes, position: int, layout: str) -> tuple[int, ...]:
    """What stands at `position`; zeros behind the end."""
    size = struct.calcsize(layout)
    return struct.unpack(layout, data[position : position + size].ljust(size, b"\0"))


def _bound(count: int, most: int, what: str) -> None:
    if count > most:
        raise ImageError("image_too_complex", f"{count} {what} or more; at most {most}")

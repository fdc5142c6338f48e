"""Images of a few hundred bytes whose headers claim to be enormous."""

from __future__ import annotations

import io
import re
import struct
import zlib

from PIL import Image


def oversize(form: str, width: int, height: int) -> bytes:
    """A small image of the format `form` (PNG, JPEG, BMP, TIFF, GIF), its header changed to this size in pixels."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, form)
    data = bytearray(file.getvalue())
    if form == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif form == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", height, width)
    elif form == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif form == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif form == "TIFF":
        for tag, value in ((256, width), (257, height)):
            [entry] = re.finditer(struct.pack("<H", tag) + rb"[\x03\x04]\x00\x01\x00\x00\x00", data)
            data[entry.start() : entry.start() + 12] = struct.pack("<HHII", tag, 4, 1, value)
    else:
        raise ValueError(f"no way known to change the header of {form}")
    return bytes(data)

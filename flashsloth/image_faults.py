"""Why bytes are not an image that is accepted: another format, a page of text, a download that broke off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image, UnidentifiedImageError

from .image_modes import ImageError

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")

# Signature -> does the file end before its format says it may?
_CUT_OFF: dict[bytes, Callable[[bytes], bool]] = {
    b"\xff\xd8\xff": lambda data: not data.rstrip(b"\x00").endswith(b"\xff\xd9"),
    b"\x89PNG": lambda data: b"IEND" not in data[-16:],
    b"RIFF": lambda data: int.from_bytes(data[4:8], "little") + 8 > len(data),
    b"BM": lambda data: int.from_bytes(data[2:6], "little") > len(data),
}


def opening_error(data: bytes, formats: Sequence[str], error: Exception) -> ImageError:
    """What `error` means, which Pillow raised at the header of `data` when only `formats` were allowed."""
    if not isinstance(error, UnidentifiedImageError):
        return decoding_error(data, error)
    document = _document_kind(data)
    if document == "lfs_pointer":
        return ImageError("image_is_lfs_pointer", "a pointer of Git LFS, not the image: git lfs pull fetches it")
    if document:
        detail = f"{len(data)} bytes of {document.upper()}; accepted: {', '.join(formats)}"
        return ImageError(f"image_is_{document}", detail)
    foreign = _foreign_format(data, formats)
    if foreign:
        return ImageError("image_format_not_allowed", f"{foreign}; accepted: {', '.join(formats)}")
    return decoding_error(data, ValueError("not a recognised image"))


def decoding_error(data: bytes, error: Exception) -> ImageError:
    """Tells a download that broke off (try again) from bytes that were never an image."""
    cut = any(data.startswith(signature) and is_cut(data) for signature, is_cut in _CUT_OFF.items())
    reason = "image_truncated" if cut or "truncated" in str(error) else "image_undecodable"
    return ImageError(reason, f"{len(data)} bytes: {type(error).__name__}: {error}")


def _document_kind(data: bytes) -> str | None:
    """What the data is that only bears an image's name: most often the page with which a server refused a download."""
    head = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if head.startswith((b"%!ps", b"\xc5\xd0\xd3\xc6")):
        return "eps"
    if head.startswith(b"version https://git-lfs"):
        return "lfs_pointer"
    if head.startswith(b"%pdf-"):
        return "pdf"
    if head.startswith((b"<?xml", b"<svg", b"<!--", b"<!doctype", b"<html", b"<head", b"<body")):
        return "svg" if b"<svg" in head else "html" if b"html" in head or b"<body" in head else "xml"
    return None


def _foreign_format(data: bytes, formats: Sequence[str]) -> str | None:
    """Name of the known format, outside `formats`, whose signature the data carries. Nothing is opened."""
    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        if name not in formats and accepts is not None and accepts(data[:16].ljust(16, b"\0")) is True:
            return name
    # What iPhones make, and Pillow alone does not know.
    return "HEIF" if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS else None

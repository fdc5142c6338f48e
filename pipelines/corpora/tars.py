"""The files in a tar, in constant memory."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from pipelines.records import FileFormatError

BLOCK = tarfile.BLOCKSIZE
"""Bytes; a file's place in a tar is a multiple of it."""


def is_plain(member: tarfile.TarInfo) -> bool:
    """Whether the bytes of `member` stand in the tar: it is no link to another file, and has all its holes."""
    return not _is_link(member) and not member.issparse()


def stop(member: tarfile.TarInfo) -> int:
    """Where `member` ends in the tar. The size that a link's header may tell is that of the other file."""
    size = 0 if _is_link(member) else member.size
    return int(member.offset_data + -(-size // BLOCK) * BLOCK)


def members(file: BinaryIO | io.BytesIO, path: str, ends: bool) -> Iterator[tarfile.TarInfo]:
    """The files in a tar, and what is not `is_plain`: links and files without holes.

    The `size` of these is what they take in the tar.

    Args:
        file: the tar, or whole samples out of it.
        path: where it lies, for messages.
        ends: it is a whole tar, whose end is then looked at.

    Raises:
        FileFormatError: it is no tar, or a damaged one; with `ends`, it is cut short or goes on after its end.
    """
    try:
        # A name that is no UTF-8 is spelled so that it can be stored: caf\xe9. It only says where a row comes from.
        tar = tarfile.TarFile(fileobj=file, errors="backslashreplace")
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # they would be kept
            if member.issparse():
                member.size = tar.offset - member.offset_data  # its own is what it had on a disk
            if member.isfile() or _is_link(member):
                yield member
    except (tarfile.TarError, OverflowError, ValueError) as error:  # the last two of sizes that no file has
        raise FileFormatError(f"{path}: no tar, or a damaged one: {error}; compressed ones must be unpacked") from error
    if not ends:
        return
    # tarfile takes whatever is no header for the end.
    file.seek(tar.offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise FileFormatError(f"{path}: ends at byte {tar.offset} without a tar's end mark: it is cut short")
    while block:
        if block.strip(b"\0"):
            raise FileFormatError(f"{path}: damaged near byte {file.tell() - len(block)}: neither a file nor the end")
        block = file.read(2**20)


def _is_link(member: tarfile.TarInfo) -> bool:
    return member.islnk() or member.issym()

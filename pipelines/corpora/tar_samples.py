"""The samples in a tar, as WebDataset has them: files that stand together and share a name up to its first dot.

What a file is, its last dot tells: 0.jpg, 0.image.png and 0.0.jpg are images, 0.caption.txt is a text.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from itertools import groupby
from tarfile import TarInfo
from typing import NamedTuple

from pipelines.corpora import tars
from pipelines.records import RowError

_IMAGES = (
    *("jpg", "jpeg", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif"),
    # These will be refused, and not be taken for rows without an image.
    *("avif", "heic", "heif", "jp2", "jxl", "svg", "ppm", "pgm", "pbm", "pnm", "jpe"),
    *("tga", "ico", "dib", "img", "image"),
)
_OTHER_MEDIA = ("mp4", "webm", "avi", "mov", "mkv", "mp3", "wav", "flac", "ogg", "m4a")
_TEXTS = ("json", "txt")
_METADATA = ("meta.json", "metadata.json")  # passed over where there is another json
# Neither an image nor a text: numbers of classes, and arrays beside an image. Without one, an array may be the image.
_NUMBERS = ("cls", "cls2", "class", "count", "id", "index", "inx")
_ARRAYS = ("npy", "npz", "pt", "pth")


class Sample(NamedTuple):
    """The files of a sample."""

    name: str
    """What they share of their names."""
    files: list[tuple[str, bytes]]
    """(suffix, content) of each that stands in the tar."""
    odd: list[TarInfo]
    """The others, which are not `tars.is_plain`."""

    def texts(self) -> dict[str, bytes]:
        """The content of the json and of the txt, where there are such.

        Raises:
            RowError: row_malformed: there are two of one kind.
        """
        found = {}
        for kind in _TEXTS:
            alike = [(suffix, data) for suffix, data in self.files if _kind(suffix) == kind]
            if len(alike) > 1:
                alike = [(suffix, data) for suffix, data in alike if suffix not in _METADATA]
            if len(alike) > 1:
                names = ", ".join(suffix for suffix, _ in alike)
                raise RowError("row_malformed", f"has two files {kind} ({names}); one would be lost", self.name)
            if alike:
                found[kind] = alike[0][1]
        return found

    def images(self, own_id: str) -> list[bytes]:
        """The images, encoded.

        Raises:
            RowError: image_not_a_file, row_malformed: a file is not `tars.is_plain`; media_not_supported: there is a
                video or a sound, and no image.
        """
        for member in self.odd:
            raise _refusal(member, own_id)
        images = [data for suffix, data in self.files if _kind(suffix) in _IMAGES]
        media = next((suffix for suffix, _ in self.files if _kind(suffix) in _OTHER_MEDIA), None)
        if media and not images:
            raise RowError("media_not_supported", f"has {media} and no image; FlashSloth looks at an image", own_id)
        return images

    def check_whole(self, lacks: str, own_id: str) -> None:
        """Raise RowError row_malformed where a file that is not read may be the `image` or the `text` that it lacks."""
        known = {*_IMAGES, *_TEXTS, *_OTHER_MEDIA, *_NUMBERS, *(_ARRAYS if lacks == "text" else ())}
        unread = sorted({suffix for suffix, _ in self.files if _kind(suffix) not in known})
        if unread:
            named = "jpg, png, webp and the like" if lacks == "image" else "json or txt"
            detail = f"has no {lacks}, which would end in {named}, but {', '.join(unread)}, which is not read"
            raise RowError("row_malformed", detail, own_id)

    def suffixes(self) -> str:
        """Of the files that stand in the tar, for messages."""
        return ", ".join(sorted({suffix for suffix, _ in self.files}))


def groups(members: Iterator[TarInfo]) -> Iterator[tuple[str, Iterator[TarInfo]]]:
    """The name and the `members` of each sample; what is not `tars.is_plain` and would not be read is passed over.

    So are files whose name begins with a dot or has none, as in WebDataset: macOS puts a ._0.jpg before each 0.jpg.
    """
    kept = (each for each in members if _belongs(each.name) and (tars.is_plain(each) or _is_read(each)))
    return groupby(kept, key=lambda member: _split(member.name)[0])


def load(file: io.BytesIO, name: str, members: Iterable[TarInfo]) -> Sample:
    """The sample `name`, whose `members` stand in `file`."""
    sample = Sample(name, [], [])
    for member in members:
        if tars.is_plain(member):
            data = file.getbuffer()[member.offset_data :][: member.size]
            sample.files.append((_split(member.name)[1], data.tobytes()))
        else:
            sample.odd.append(member)
    return sample


def _refusal(member: TarInfo, own_id: str) -> RowError:
    reason = "image_not_a_file" if _kind(_split(member.name)[1]) in _IMAGES else "row_malformed"
    what, remedy = f"a link to {member.linkname}, not a file in the tar", "--dereference"
    if member.islnk():
        remedy = "--hard-dereference"
    elif member.issparse():
        what, remedy = "in the tar without its holes", "without --sparse"
    return RowError(reason, f"{member.name} is {what}; pack it with tar {remedy}", own_id)


def _split(name: str) -> tuple[str, str]:
    """What the files of a sample share of their names, and the suffix."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _kind(suffix: str) -> str:
    return suffix.rpartition(".")[2]


def _is_read(member: TarInfo) -> bool:
    return _kind(_split(member.name)[1]) in (*_IMAGES, *_TEXTS)


def _belongs(name: str) -> bool:
    return name.rpartition("/")[2].find(".") > 0

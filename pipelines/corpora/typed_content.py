"""Typed content of chat messages: their texts, and the images that stand among them.

A text spells the marker `<image>` freely within a sentence, as in serving. Where the text of a question begins or ends
with it, it stands for an image, as in content that is text: it is taken out where it only repeats an image part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.corpora import fields
from pipelines.records import RowError

ADDRESSES = ("image", "url", "path")
"""Fields of an image part that name the image."""
_IN_ROW = object()  # an image part that leaves the address to the row


def parts(role: str, content: Any, number: int, own_id: str) -> tuple[str, list[Any]]:
    """The text of a message, and the addresses of its images."""
    if isinstance(content, str):
        markers = content.count(fields.IMAGE_MARKER) if role == "user" else 0
        return content.replace(fields.IMAGE_MARKER, "").strip() if markers else content, [_IN_ROW] * markers
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        found = fields.kind(content)
        raise RowError("row_malformed", f"turn {number}: 'content' is text or a list of parts, this is {found}", own_id)
    texts, images = [], []
    for part in content:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") == "image_url":
            url = part.get("image_url")
            images.append(url.get("url") if isinstance(url, dict) else url)
        elif part.get("type") == "image":
            named = (part[name] for name in ADDRESSES if part.get(name) not in (None, ""))
            images.append(next(named, _IN_ROW))
        else:
            detail = f"turn {number}: a part of type {part.get('type')!r}; text, image and image_url are understood"
            raise RowError("row_malformed", detail, own_id)
    if role == "user":
        texts = _unmarked(texts, len(images), number, own_id)
    return "\n".join(texts), images


def _unmarked(texts: list[str], num_images: int, number: int, own_id: str) -> list[str]:
    """`texts` of a question without markers at their ends, of which there must be one for each image part, or none."""
    found = [_bare(text) for text in texts]
    count = sum(markers for _, markers in found)
    if count not in (0, num_images):
        detail = f"turn {number}: {count} {fields.IMAGE_MARKER} in its texts beside {num_images} image part(s)"
        raise RowError("image_marker_mismatch", detail, own_id)
    return [text for text, markers in found if text or not markers]


def _bare(text: str) -> tuple[str, int]:
    """`text` without the markers with which it begins and ends, and how many they are."""
    pieces = text.split(fields.IMAGE_MARKER)
    filled = [place for place, piece in enumerate(pieces) if piece.strip()] or [0]
    kept = pieces[filled[0] : filled[-1] + 1]
    markers = len(pieces) - len(kept)
    return (fields.IMAGE_MARKER.join(kept).strip(), markers) if markers else (text, 0)


def placed(found: list[tuple[str, list[Any]]], beside: list[Any], own_id: str) -> list[str | bytes]:
    """The images that the parts of all messages name, those of the row itself (`beside`) put where they belong."""
    images = [image for _, images in found for image in images]
    if images.count(_IN_ROW) != len(beside):
        detail = f"{images.count(_IN_ROW)} image parts without an address for {len(beside)} image(s)"
        raise RowError("image_marker_mismatch", detail, own_id)
    first = next((number for number, (role, _) in enumerate(found) if role == "user"), None)
    stray = next((number for number, (_, images) in enumerate(found) if images and number != first), None)
    if stray is not None and len(images) == 1:
        raise RowError("image_marker_misplaced", f"the image stands in turn {stray}, not in the first question", own_id)
    rest = iter(beside)
    return [loaded(next(rest) if image is _IN_ROW else image, own_id) for image in images]


def image_parts(turns: Any) -> Iterator[dict[str, Any]]:
    """The parts of typed content that are images, of whatever a row holds as chat messages."""
    for turn in turns if isinstance(turns, list) else []:
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") == "image":
                yield part


def without_names(turns: Any) -> None:
    """Let each image part that names a file leave the address to the row; a data URI is no name."""
    for part in image_parts(turns):
        for field in ADDRESSES:
            if not str(part.get(field)).startswith("data:"):
                part.pop(field, None)


def loaded(address: Any, own_id: str) -> Any:
    """The bytes of a data URI; every other address as it is."""
    # Here, since what plans a run imports this module too, and needs none of the model's libraries.
    from flashsloth.image_processing_flashsloth import ImageError, is_data_uri, read_data_uri

    try:
        return read_data_uri(address) if isinstance(address, str) and is_data_uri(address) else address
    except ImageError as error:
        raise RowError(error.reason, error.detail, own_id) from error

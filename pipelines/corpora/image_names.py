"""What a field is called that is an image or names one: image_url, img, decoded_image, imagePath, photo_2.

Whatever it is called, a field names one whose value does: file_name: "a.jpg", media: "data:image/png;...".

Of such fields `image` and `images` are read. A row or a file without these, and with one of the others, would become a
row of text about an image that nobody has seen.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of image_url, imageUrl and IMAGE_URL; digits are none
_IMAGE = re.compile(r"(image|img|jpe?g|png|webp|picture|pic|photo)s?(file)?(name|path|uri|url|bytes|data|base|b)?s?")
_FILE = re.compile(r"data:image/.*|[^\s<>]*[^\s<>/]\.(jpe?g|png|webp|bmp|tiff?|gif)([?#]\S*)?", re.I | re.DOTALL)
_LONGEST_NAME = 4096  # characters
# What follows on the word tells what the field is: an id, a size or a text is none, however it came by its type.
_OF_AN_IMAGE = {
    *("id", "ids", "idx", "index", "key", "uid", "uuid", "hash", "phash", "md", "sha"),
    *("width", "height", "size", "sizes", "resolution", "ratio", "shape", "count", "num", "number"),
    *("caption", "captions", "description", "descriptions", "text", "texts", "title", "alt", "prompt", "prompts"),
    *("label", "labels", "tag", "tags", "class", "category", "categories", "type", "format", "mode", "quality"),
    *("license", "credit", "author"),
}
_BEFORE_A_COUNT = {"has", "is", "no", "num", "number", "n", "count", "needs", "with", "without"}


def seems_image(field: str) -> bool:
    """Whether the name `field` is that of an image, or of what names one."""
    words = [word.lower() for word in _WORD.findall(field)]
    place = next((place for place, word in enumerate(words) if _IMAGE.fullmatch(word)), None)
    if place is None or _BEFORE_A_COUNT.intersection(words[:place]):
        return False
    return not _OF_AN_IMAGE.intersection(words[place + 1 :])


def names_image(value: str) -> bool:
    """Whether a text is the path or the address of an image, or the image itself as a data URI, and nothing else."""
    text = value.strip()
    return bool(_FILE.fullmatch(text)) if len(text) <= _LONGEST_NAME else text[:11].lower() == "data:image/"

"""Pictures of every mode -> RGB, by a fixed rule per mode, and what is wrong with an image: `ImageError`.

What Pillow has decoded does not say all that the file does. These parts are read here before they are lost:

    TIFF, 16-bit grey       whether 0 is white: Pillow turns 1 to 8 bits itself, and leaves 16 as they are stored; and
                            whether they are 12, which it hands over as 16
    PNG, 2- and 4-bit grey  the hidden sample: Pillow spreads the pixels to 8 bits, and leaves the sample as it is
    PNG, 16-bit RGB         the hidden colour: Pillow keeps the high byte of each sample, and the colour whole
"""

from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

GREY = (127, 127, 127)  # int(255 * mean): what the published HD padding uses; also what shows through transparency


class ImageError(ValueError):
    """An image that cannot be used.

    Attributes:
        reason: one of image_empty, image_format_not_allowed, image_too_large, image_bad_size, image_too_complex,
            image_truncated, image_undecodable, and for documents that only bear an image's name image_is_html,
            image_is_xml, image_is_svg, image_is_pdf, image_is_eps, image_is_lfs_pointer; stable, meant for counting.
        detail: what was found, for a person.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)  # both in args: the error crosses processes by pickle
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a picture of any mode to RGB, by a fixed rule per mode.

    Transparency shows grey 127, never the hidden colour; 16-bit grey is scaled to 8 bits (Pillow's own conversion
    would saturate), the right way round where a TIFF's 0 is white; palette, CMYK, 1-bit and the rest go by Pillow's
    conversion, colour profiles ignored.

    Args:
        image: is loaded here. Of a PNG that was loaded or copied before, the hidden colour counts as Pillow takes it.

    Raises:
        ImageError: image_undecodable for 32-bit integer and float pictures, whose range is not defined, and for a
            hidden colour of 16-bit samples that cannot be compared any more.
    """
    _load(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        raise ImageError(
            "image_undecodable", f"32-bit samples (mode {image.mode}) have no defined range; save as 8 or 16 bit"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*GREY, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _load(image: Image.Image) -> None:
    """Loads a picture, in place, so that its transparency is that of its file; one that is loaded stays as it is."""
    depth = _png_depth(image)
    if depth == "RGB;16B" and "transparency" in image.info and image.tell() == 0:
        _load_16_bits(image)
        return
    image.load()
    colour = image.info.get("transparency")
    if colour is None:
        return
    if depth in _GREY_BITS:
        highest = 2 ** _GREY_BITS[depth] - 1
        image.info["transparency"] = (colour & highest) * (255 // highest)  # tRNS has 16 bits: the lowest count
    elif depth == "RGB":
        image.info["transparency"] = tuple(sample & 255 for sample in colour)
    elif depth == "RGB;16B" or (image.mode == "RGB" and np.max(colour) > 255):
        # Declared after the pixels, against the format; or of a later frame; or loaded before, by Pillow alone.
        raise ImageError("image_undecodable", f"the hidden colour {colour} cannot be told in samples cut to 8 bits")


# Pillow's name for how a grey PNG's samples are stored -> their bits.
_GREY_BITS = {"L;2": 2, "L;4": 4, "L": 8}


def _png_depth(image: Image.Image) -> Any:
    """Pillow's name for how a PNG's samples are stored; only a picture that is not loaded has it."""
    return image.tile[0].args if isinstance(image, PngImageFile) and image.tile else None


def _load_16_bits(image: Any) -> None:
    """Loads a 16-bit RGB PNG with a hidden colour as RGBA.

    A pixel is hidden where both bytes of each sample are the colour's, so the file is decoded twice, once for each.
    """
    colour = image.info["transparency"]
    image.fp.seek(0)
    lower = PngImageFile(image.fp)  # reads the same open file, and is through with it before `image` reads on
    lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]  # as if the low byte were the high one
    hidden = _equals(lower, [sample & 255 for sample in colour])
    hidden &= _equals(image, [sample >> 8 for sample in colour])
    image.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    del image.info["transparency"]


def _equals(image: Image.Image, colour: list[int]) -> np.ndarray:
    equal = np.ones((image.height, image.width), bool)
    for channel, sample in enumerate(colour):
        equal &= np.asarray(image.getchannel(channel)) == sample
    return equal


def _from_16_bits(image: Image.Image) -> Image.Image:
    samples = np.asarray(image).astype(np.uint32)
    hidden = samples == image.info.get("transparency", -1)
    highest = 2**12 - 1 if _tag(image, ExifTags.Base.BitsPerSample) == (12,) else 2**16 - 1
    if _tag(image, ExifTags.Base.PhotometricInterpretation) == 0:
        # One that does not say is taken as Pillow takes it in 8 bits, where it is the one that turns the samples.
        samples = highest - samples
    grey = ((255 * samples + highest // 2) // highest).astype(np.uint8)
    grey[hidden] = GREY[0]
    return Image.fromarray(grey).convert("RGB")


def _tag(image: Image.Image, tag: int) -> Any:
    """What a TIFF says, 0 where it does not; None of another picture."""
    tags = getattr(image, "tag_v2", None)
    return None if tags is None else tags.get(tag, 0)

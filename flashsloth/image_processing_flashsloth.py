"""Images: bytes -> RGB picture -> tiles -> pixels, one code path for preparing, training and serving.

`decode_image` takes bytes from strangers: formats are allow-listed, the header's size and how the file is put together
are checked before anything is decoded, and whatever is wrong becomes an `ImageError` with a reason.
`FlashSlothImageProcessor` resizes and cuts tiles:

    base  1 tile   the whole image squashed to size x size
    hd    5 tiles  the same, then the image padded to a square with grey, resized to 2 size x 2 size and cut in four

Resampling is Pillow's bicubic, computed by `resampling`: torchvision's differs by more than the 1e-5 by which we agree
with the published model.
"""

import base64
import io
import string
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from . import image_faults
from .configuration_flashsloth import TILES
from .image_modes import GREY, ImageError, to_rgb
from .image_structure import check_structure, has_few_tags
from .resampling import resize

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
WITH_GIF = (*IMAGE_FORMATS, "GIF")  # whoever takes GIFs takes their first frame
MAX_PIXELS = 50_000_000  # 150 MB as RGB; a 48-megapixel phone photo passes, and Pillow itself only warns at 89 million
MIN_SIDE = 4  # pixels; below this there is nothing to see
MAX_SIDE = 12_000  # pixels; the HD square pads the short side up to the long one, so area alone does not bound memory
MAX_ASPECT = 200  # long side : short side
_SPACE = string.whitespace.encode()

# Pillow's warnings are silenced while a header is read: of bombs (our limit is lower and raises), and one for each odd
# tag. `catch_warnings` swaps process-wide state, so threads that decode at the same time take turns; reading a header
# takes microseconds, of one with as much in it as `check_structure` lets pass milliseconds.
_HEADER_LOCK = threading.Lock()


def is_data_uri(address: str) -> bool:
    """Whether `address` is the image itself, as `read_data_uri` takes it, and not where one lies."""
    return address[:5].lower() == "data:"


def read_data_uri(uri: str) -> bytes:
    """The bytes in `uri`, which is "data:image/png;base64,..." or the like.

    Raises:
        ImageError: `uri` is no such thing.
    """
    header, _, payload = uri.partition(",")
    if not header.lower().endswith(";base64"):
        raise ImageError("image_undecodable", f"{header[:40]!r}: a data URI must be base64")
    try:
        # Some tools break it into lines.
        return base64.b64decode(payload.encode("ascii").translate(None, _SPACE), validate=True)
    except ValueError as error:  # binascii.Error, and another one for letters that are not even ASCII
        raise ImageError("image_undecodable", f"{header[:40]!r}: not base64: {error}") from error


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = IMAGE_FORMATS) -> Image.Image:
    """Decodes untrusted bytes to an upright RGB picture.

    Of a file with several frames or pages the first is taken. GIF is refused unless `formats` names it.

    Args:
        data: an encoded image.
        max_pixels: width x height above which the image is refused, before decoding.
        formats: Pillow's names of the formats to accept.

    Raises:
        ImageError: for every image that cannot be used; nothing else is raised, whatever the bytes.
    """
    if not data:
        raise ImageError("image_empty", "0 bytes")
    check_structure(data)
    image = _open_header(data, formats)
    _check_size(*image.size, max_pixels)
    try:
        rgb = to_rgb(image)  # before it is turned: a TIFF loses its tags there
        return _upright(rgb, _orientation(image))
    except ImageError:
        raise
    except Exception as error:  # decoders raise anything from SyntaxError to zlib.error on hostile bytes
        raise image_faults.decoding_error(data, error) from error


def normalize_pixels(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape -> float32 in [-1, 1] (mean 0.5, std 0.5), on the device where they are."""
    return (pixels.float() / 255 - 0.5) / 0.5


class FlashSlothImageProcessor(BaseImageProcessor):
    """Pictures -> `pixel_values`, without torchvision.

    Args:
        tiling: "base" (1 tile) or "hd" (5 tiles: the whole, top-left, top-right, bottom-left, bottom-right).
        size: side of a tile in pixels, the tower's image size.

    Raises:
        ValueError: for a tiling that does not exist or a size that is not positive.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (read as an attribute by transformers)

    def __init__(self, tiling: str = "base", size: int = 384, **kwargs: Any):
        super().__init__(**kwargs)
        if tiling not in TILES:
            raise ValueError(f"tiling is {tiling!r}; it must be one of {sorted(TILES)}")
        if size < 1:
            raise ValueError(f"size is {size}; a tile needs at least 1 pixel")
        self.tiling = tiling
        self.size = size

    @property
    def num_tiles(self) -> int:
        """Tiles per image: 1 or 5."""
        return TILES[self.tiling]

    def to_uint8(self, image: Image.Image, out: np.ndarray | None = None) -> np.ndarray:
        """One picture -> `uint8[T, 3, size, size]`, tiles in the order of the sequence. What shards may store.

        Args:
            image: of any size and mode.
            out: where to write the tiles, and what is returned; a new array where None.
        """
        image = to_rgb(image)
        pixels = np.empty((self.num_tiles, 3, self.size, self.size), np.uint8) if out is None else out
        resize(np.asarray(image), self.size, pixels[0])
        if self.tiling == "hd":
            square = resize(np.asarray(_padded_square(image)), 2 * self.size)
            pixels[1:] = _quarters(square, self.size)
        return pixels

    def preprocess(  # type: ignore[override]
        self, images: Image.Image | Sequence[Image.Image], return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """Pictures -> `pixel_values: float32[N, T, 3, size, size]`.

        Args:
            images: one Pillow picture or several; decode bytes with `decode_image` first.
            return_tensors: "pt" or None, both give torch tensors, and "np".

        Raises:
            TypeError: for anything that is not a Pillow picture.
        """
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        for index, picture in enumerate(pictures):
            if not isinstance(picture, Image.Image):
                raise TypeError(f"image {index} is a {type(picture).__name__}; pass PIL images (bytes: decode_image)")
        shape = (0, self.num_tiles, 3, self.size, self.size)
        tiles = np.stack([self.to_uint8(picture) for picture in pictures]) if pictures else np.zeros(shape, np.uint8)
        return BatchFeature({"pixel_values": normalize_pixels(torch.from_numpy(tiles))}, tensor_type=return_tensors)


def _padded_square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _quarters(square: np.ndarray, size: int) -> list[np.ndarray]:
    return [square[:, y : y + size, x : x + size] for y in (0, size) for x in (0, size)]


# EXIF orientation -> how to turn the picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image, orientation: Any) -> Image.Image:
    # `ImageOps.exif_transpose` also writes the EXIF block anew, and fails on good pictures whose other tags are odd.
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> Any:
    if not has_few_tags(_exif(image)):  # a block that cannot be read in reasonable time, like one that cannot at all
        return None
    try:
        with _reading_header():
            return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of a block that cannot be read, by its format anything; Pillow's JPEG takes it for none as well
        return None


def _exif(image: Image.Image) -> bytes:
    """The EXIF block from which Pillow reads the orientation; a TIFF's is the file itself."""
    block = image.info.get("exif")
    text = image.info.get("Raw profile type exif")  # as ImageMagick writes it into a PNG
    if block is None and isinstance(text, str):
        try:
            block = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            return b""
    return block.removeprefix(b"Exif\0\0") if isinstance(block, bytes) else b""


@contextmanager
def _reading_header() -> Iterator[None]:
    with _HEADER_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open_header(data: bytes, formats: Sequence[str]) -> Image.Image:
    try:
        with _reading_header():
            return Image.open(io.BytesIO(data), formats=tuple(formats))
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_large", str(error)) from error
    except Exception as error:  # a broken header raises as freely as a broken body
        raise image_faults.opening_error(data, formats, error) from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    short, long = sorted((width, height))
    if short < MIN_SIDE:
        raise ImageError("image_bad_size", f"{width}x{height}; each side needs at least {MIN_SIDE} pixels")
    if long > MAX_ASPECT * short:
        raise ImageError("image_bad_size", f"{width}x{height}; sides differ by more than {MAX_ASPECT} to 1")
    if width * height > max_pixels:
        raise ImageError("image_too_large", f"{width}x{height} = {width * height} pixels; at most {max_pixels}")
    if long > MAX_SIDE:
        raise ImageError("image_too_large", f"{width}x{height}; at most {MAX_SIDE} pixels a side")

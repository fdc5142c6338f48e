"""Small images of every kind with the pixels that they must decode to: `python -m tests.golden_images` writes them.

The pixels are computed here from what is drawn, by the rules in the docstring of `to_rgb`, and never by the code under
test. Both are committed: another version of Pillow then decodes the files that this one has encoded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save

FOLDER = Path(__file__).parent / "golden" / "images"
PIXELS = "pixels.safetensors"
_GREY = 127
_HEIGHT, _WIDTH = 6, 10
_RANDOM = np.random.default_rng(20260101)


def over_grey(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """uint8[H, W, 3] with alpha uint8[H, W], over grey 127, rounded."""
    share = alpha[..., None].astype(np.float64) / 255
    return np.rint(colour * share + _GREY * (1 - share)).astype(np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    """uint8[H, W] -> the same grey in three channels."""
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)


def draw(*channels: int, high: int = 256, dtype: type = np.uint8) -> np.ndarray:
    """Random samples, 6 rows of 10."""
    return _RANDOM.integers(0, high, (_HEIGHT, _WIDTH, *channels), dtype=dtype)


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    """`image` as a file of the format `form`."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def images() -> Iterator[tuple[str, bytes, np.ndarray]]:
    """File name, its bytes and its pixels, uint8[H, W, 3]."""
    yield from _without_transparency()
    yield from _with_transparency()
    yield from _oriented()
    yield from _animated()


def _without_transparency() -> Iterator[tuple[str, bytes, np.ndarray]]:
    rgb = draw(3)
    for suffix, form in (("png", "PNG"), ("bmp", "BMP"), ("tif", "TIFF")):
        yield f"rgb.{suffix}", encode(Image.fromarray(rgb), form), rgb
    yield "rgb.webp", encode(Image.fromarray(rgb), "WEBP", lossless=True), rgb
    plain = np.full((16, 16, 3), (200, 120, 40), np.uint8)  # a JPEG keeps one colour nearly as it is
    yield "rgb.jpg", encode(Image.fromarray(plain), "JPEG", quality=100), plain
    inks = np.full((16, 16, 4), (20, 100, 200, 30), np.uint8)
    for suffix, form in (("tif", "TIFF"), ("jpg", "JPEG")):
        # Each ink takes its share of the light that the black one leaves.
        light = (255 - inks[..., :3].astype(np.float64)) * (255 - inks[..., 3:]) / 255
        yield f"cmyk.{suffix}", encode(Image.fromarray(inks, "CMYK"), form), np.rint(light).astype(np.uint8)
    palette, indices = draw(3)[:4].reshape(-1, 3), draw(high=40)
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    yield "palette.png", encode(image, "PNG"), palette[indices]
    values = draw()
    yield "grey.png", encode(Image.fromarray(values), "PNG"), grey(values)
    deep = draw(high=2**16, dtype=np.uint16)
    deep[0, :4] = (0, 1, 65534, 65535)
    for suffix, form in (("png", "PNG"), ("tif", "TIFF")):
        yield f"grey16.{suffix}", encode(Image.fromarray(deep), form), grey(np.rint(deep / 257))
    bits = draw(high=2).astype(bool)
    for suffix, form in (("png", "PNG"), ("tif", "TIFF"), ("bmp", "BMP")):
        yield f"bits.{suffix}", encode(Image.fromarray(bits), form), grey(bits * 255)


def _with_transparency() -> Iterator[tuple[str, bytes, np.ndarray]]:
    rgba = draw(4)
    rgba[0, :3, 3] = (0, 128, 255)
    pixels = over_grey(rgba[..., :3], rgba[..., 3])
    for suffix, form in (("png", "PNG"), ("tif", "TIFF")):
        yield f"rgba.{suffix}", encode(Image.fromarray(rgba), form), pixels
    yield "rgba.webp", encode(Image.fromarray(rgba), "WEBP", lossless=True, exact=True), pixels
    values = draw(2)
    values[0, :3, 1] = (0, 128, 255)
    seen = over_grey(grey(values[..., 0]), values[..., 1])
    yield "grey_alpha.png", encode(Image.fromarray(values, "LA"), "PNG"), seen
    palette, alphas, indices = draw(3)[:2].reshape(-1, 3), draw()[:2].reshape(-1), draw(high=20)
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    clear = encode(image, "PNG", transparency=alphas.tobytes())
    yield "palette_alpha.png", clear, over_grey(palette[indices], alphas[indices])


def _oriented() -> Iterator[tuple[str, bytes, np.ndarray]]:
    """What a camera stores that was held as EXIF's tag 274 says; the pixels are as they were seen."""
    stored = draw(3)
    turns = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored.transpose(1, 0, 2)[:, ::-1],
        7: stored.transpose(1, 0, 2)[::-1, ::-1],
        8: stored.transpose(1, 0, 2)[::-1],
    }
    for orientation, seen in turns.items():
        exif = Image.Exif()
        exif[274] = orientation
        yield f"exif{orientation}.png", encode(Image.fromarray(stored), "PNG", exif=exif), seen


def _animated() -> Iterator[tuple[str, bytes, np.ndarray]]:
    """Three frames, of which the first counts."""
    indices, palette = draw(high=32), draw(3)[:4].reshape(-1, 3)
    frames = [Image.fromarray(palette[(indices + shift) % 32]) for shift in range(3)]
    several = {"save_all": True, "append_images": frames[1:], "duration": 50}
    yield "frames.gif", encode(frames[0], "GIF", **several), palette[indices]
    yield "frames.webp", encode(frames[0], "WEBP", **several, lossless=True), palette[indices]


def main() -> None:
    """Write all files anew."""
    FOLDER.mkdir(exist_ok=True)
    pixels = {}
    for name, data, seen in images():
        (FOLDER / name).write_bytes(data)
        pixels[name] = np.ascontiguousarray(seen)
    (FOLDER / PIXELS).write_bytes(save(pixels))


if __name__ == "__main__":
    main()

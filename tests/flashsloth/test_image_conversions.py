"""Every kind of image against golden pixels: tests/golden_images.py says where they come from."""

import re

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from flashsloth.image_processing_flashsloth import WITH_GIF, decode_image
from tests.golden_images import FOLDER, PIXELS, images

GOLDEN = load_file(FOLDER / PIXELS)
MODES = {"cmyk": "CMYK", "palette": "P", "grey": "L", "bits": "1", "rgba": "RGBA", "grey_alpha": "LA"}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_an_image_decodes_to_its_golden_pixels(name):
    decoded = np.asarray(decode_image((FOLDER / name).read_bytes(), formats=WITH_GIF)).astype(int)
    assert decoded.shape == GOLDEN[name].shape
    # A JPEG holds brightness and two differences of colour, rounded to whole numbers; all others are exact.
    assert np.abs(decoded - GOLDEN[name]).max() <= (1 if name.endswith(".jpg") else 0)


def test_the_files_are_of_the_kinds_that_they_are_named_after():
    for file in FOLDER.glob("*.*"):
        kind = file.stem
        if kind in MODES and file.suffix != ".safetensors":
            assert Image.open(file).mode == MODES[kind], file.name
        if kind.startswith("grey16"):
            assert Image.open(file).mode.startswith("I;16")
        if kind == "frames":
            assert Image.open(file).n_frames == 3
        if match := re.fullmatch(r"exif(\d)", kind):
            assert Image.open(file).getexif()[274] == int(match[1])
    assert "transparency" in Image.open(FOLDER / "palette_alpha.png").info


def test_the_golden_files_are_all_there():
    names = {name for name, _, _ in images()}
    assert set(GOLDEN) == names == {file.name for file in FOLDER.iterdir()} - {PIXELS}

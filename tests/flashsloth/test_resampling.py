"""Resampling, compared with Pillow: to the last bit, for pictures of all shapes."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flashsloth import resampling
from flashsloth.resampling import resize

BICUBIC = Image.Resampling.BICUBIC
SIDES = st.integers(1, 700)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def by_pillow(picture: np.ndarray, size: int) -> np.ndarray:
    """Pillow's, one axis after the other in an order that is ours to choose: its own changed with version 13."""
    height, width, _ = picture.shape
    between = (width, size) if height > size and height - size > 2 * (width - size) else (size, height)
    small = Image.fromarray(picture).resize(between, BICUBIC).resize((size, size), BICUBIC)
    return np.asarray(small).transpose(2, 0, 1)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.integers(1, 500), st.integers(0, 2**32 - 1))
def test_every_bit_is_pillows(height, width, size, seed):
    picture = noise(height, width, seed)
    np.testing.assert_array_equal(resize(picture, size), by_pillow(picture, size))


@pytest.mark.parametrize(
    ("height", "width"), [(384, 384), (4, 800), (800, 4), (3000, 2000), (2000, 3000), (12_000, 60), (60, 12_000)]
)
def test_sizes_of_photos_and_of_what_is_barely_allowed(height, width):
    picture = noise(height, width)
    np.testing.assert_array_equal(resize(picture, 384), by_pillow(picture, 384))


def test_what_overshoots_is_cut_off():
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[::2] = 255
    pixels = resize(picture, 100)
    assert (pixels.min(), pixels.max()) == (0, 255)
    np.testing.assert_array_equal(pixels, by_pillow(picture, 100))


def test_a_part_of_a_picture_and_a_place_of_a_batch():
    picture = noise(90, 120)[10:70, ::2]
    batch = np.zeros((2, 3, 50, 50), np.uint8)
    assert resize(picture, 50, batch[1]).base is batch
    np.testing.assert_array_equal(batch[1], by_pillow(np.ascontiguousarray(picture), 50))
    assert not batch[0].any()


def test_threads_do_not_disturb_each_other():
    pictures = [noise(100 + 10 * number, 333, number) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda picture: resize(picture, 64), pictures * 4))
    for picture, pixels in zip(pictures * 4, results, strict=True):
        np.testing.assert_array_equal(pixels, by_pillow(picture, 64))


@pytest.mark.parametrize(
    "picture",
    [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)],
)
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(ValueError, match=r"uint8\[H, W, 3\]; this is (float64|uint8)\["):
        resize(picture, 8)


def test_where_no_folder_can_be_written_each_process_compiles_for_itself():
    """As in a container with a read-only root, of a user without a home."""
    code = "import numpy, resampling; print(resampling.resize(numpy.full((5, 5, 3), 7, numpy.uint8), 9).max())"
    folder = str(Path(resampling.__file__).parent)
    # The one place that numba may then think of is that of notebooks, where this is none.
    environment = {**os.environ, "PYTHONPATH": folder, "NUMBA_CACHE_LOCATOR_CLASSES": "_IPythonCacheLocator"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr

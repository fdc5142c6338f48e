"""HD models whose tower learns, on ranks with images, without, and with both: nobody waits for ever."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from flashsloth import FlashSlothImageProcessor, FlashSlothProcessor
from tests.fixtures.tiny import train_tokenizer
from tests.prepared import coloured_rows, write_prepared
from tests.training import losses, recipe
from tests.training_ranks import count_tower_forwards, train_on


@pytest.fixture(scope="module")
def prepared_hd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hd")
    images = FlashSlothImageProcessor(tiling="hd", size=126)
    processor = FlashSlothProcessor(images, train_tokenizer(), num_image_tokens=45)
    processor.save_pretrained(root / "processor")
    write_prepared(root / "data", coloured_rows(20, text_only_every=3), processor)
    return root


def test_a_tower_that_learns_rests_only_where_no_rank_needs_it(prepared_hd: Path, tmp_path: Path) -> None:
    """Step 1 is all images, step 2 mixed, step 3 all text; then the next epoch."""
    found = {}
    for name, workers, stage in (("alone", 1, 2), ("stage-1", 2, 1), ("stage-2", 2, 2), ("stage-3", 2, 3)):
        settings = recipe(prepared_hd, tmp_path / name, deepspeed__stage=stage, max_steps=5)
        said = train_on(workers, settings, tmp_path / "logs", trouble=count_tower_forwards)
        images, ran = _images_and_runs(said)
        assert (sorted(images[1]), sorted(images[2])) == ([2, 2, 2, 2], [0, 2, 2, 2]) and set(images[3]) == {0}
        assert ran[1] == ran[2] == 4
        assert ran[3] == (len(images[3]) if stage == 3 else 0)
        found[name] = list(losses(settings).values())
    for name, values in found.items():
        np.testing.assert_allclose(values, found["alone"], rtol=1e-5, err_msg=name)


def _images_and_runs(said: str) -> tuple[dict[int, list[int]], dict[int, int]]:
    """Step -> images of each micro-batch, and how often the tower ran, over all ranks."""
    images: dict[int, list[int]] = {}
    ran: dict[int, int] = {}
    for step, listed, times in re.findall(r"step (\d+) rank \d+: images \[(.*)\], tower ran (\d+) times", said):
        images.setdefault(int(step), []).extend(int(each) for each in listed.split(","))
        ran[int(step)] = ran.get(int(step), 0) + int(times)
    return images, ran

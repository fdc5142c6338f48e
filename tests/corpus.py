"""A small corpus on disk for tests of the preparation: drawn images, LLaVA rows, and every kind of bad row."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.fixtures.tiny import build_processor

Row = dict[str, Any]


def picture(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """A smooth image of its own colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(seed: int) -> bytes:
    """The picture as a JPEG."""
    file = io.BytesIO()
    picture(seed).save(file, "JPEG")
    return file.getvalue()


def row(number: int, **change: Any) -> Row:
    """Row `number` of a good corpus; ids repeat, and every fourth row is text only."""
    has_image = number % 4 != 3
    question = "<image>\nWhat color is the square?" if has_image else "What color is a square?"
    turns = [("human", question), ("gpt", "The square is red."), ("human", "How many?"), ("gpt", f"{number} circles.")]
    conversations = [{"from": speaker, "value": text} for speaker, text in turns]
    image = {"image": f"images/{number}.jpg"} if has_image else {}
    return {"id": f"own-{number % 3}", **image, "conversations": conversations} | change


def bad_rows(folder: Path) -> dict[str, Row | str]:
    """Reason -> a row that goes to the quarantine for it; writes the bad images below `folder`."""
    images = folder / "images"
    (images / "empty.jpg").touch()
    (images / "page.jpg").write_text("<!DOCTYPE html><html><body>403 Forbidden</body></html>")
    (images / "noise.jpg").write_bytes(b"\xff\xd8\xff" + bytes(range(256)) + b"\xff\xd9")
    picture(0).save(images / "moving.jpg", "GIF")
    (images / "cut.jpg").write_bytes(encoded(0)[:-300])
    return {
        "image_missing": row(0, image="images/nowhere.jpg"),
        "image_empty": row(0, image="images/empty.jpg"),
        "image_is_html": row(0, image="images/page.jpg"),
        "image_undecodable": row(0, image="images/noise.jpg"),
        "image_format_not_allowed": row(0, image="images/moving.jpg"),
        "image_truncated": row(0, image="images/cut.jpg"),
        "path_not_allowed": row(0, image="../secret.jpg"),
        "image_marker_mismatch": row(3, image="images/0.jpg"),
        "empty_answer": row(3, conversations=[{"from": "human", "value": "Q"}, {"from": "gpt", "value": " "}]),
        "role_order": row(3, conversations=[{"from": "gpt", "value": "A"}, {"from": "human", "value": "Q"}]),
        "no_loss_tokens": row(3, conversations=[{"from": "human", "value": "Q"}]),
        "too_long": row(3, conversations=[{"from": "human", "value": "Q " * 3000}, {"from": "gpt", "value": "A"}]),
        "row_malformed": '{"id": "cut',
    }


def write_corpus(folder: Path, rows: list[Row | str] | int, name: str = "corpus.jsonl") -> Path:
    """Write rows (a number: that many good ones) and the good rows' images; a str is written as it is."""
    if isinstance(rows, int):
        rows = [row(number) for number in range(rows)]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(len(rows)):
        (folder / "images" / f"{number}.jpg").write_bytes(encoded(number))
    lines = [each if isinstance(each, str) else json.dumps(each) for each in rows]
    path = folder / name
    path.write_text("[" + ",\n".join(lines) + "]" if name.endswith(".json") else "\n".join(lines) + "\n")
    return path


def write_processor(folder: Path, tiling: str = "base") -> Path:
    """A saved processor that fits the tiny model."""
    build_processor(tiling).save_pretrained(folder / "processor")
    return folder / "processor"

"""Scenes to pictures. Edges are smooth because a pixel is covered by its distance to the edge, not by yes or no."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipelines.scenes.scene import Scene, SceneObject

PALETTE = {"red": (219, 44, 44), "green": (42, 168, 72), "blue": (48, 88, 222), "yellow": (240, 204, 40)}
COLOR_SPREAD = 16

# Corners in the box [-1, 1] x [-1, 1], y pointing down, clockwise on the screen.
# Half width and half height in units of the radius.
_EXTENTS = {"square": (0.84, 0.84), "bar": (0.98, 0.26), "column": (0.26, 0.98)}


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The picture of a scene: RGB, `scene.width` x `scene.height`.

    `rng` chooses shades and noise, nothing that is asked about.
    """
    canvas = _background(scene, rng)
    for scene_object in scene.objects:
        _paint(canvas, scene_object, rng)
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))


def _background(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """float32[H, W, 3]: nearly grey, so that no background passes for one of the colours."""
    light, dark = rng.uniform(195, 250), rng.uniform(12, 70)
    tint = rng.uniform(-8, 8, size=3).astype(np.float32)
    level: np.ndarray | float
    if scene.background == "gradient":
        ramp_y, ramp_x = np.linspace(0, 1, scene.height)[:, None], np.linspace(0, 1, scene.width)[None, :]
        share = rng.uniform()
        ramp = share * ramp_x + (1 - share) * ramp_y
        start, end = (light, dark) if rng.uniform() < 0.5 else (dark, light)
        level = start + (end - start) * ramp
    elif scene.background == "noise":
        level = rng.uniform(60, 200) + rng.normal(0, 14, size=(scene.height, scene.width))
    else:
        level = light if scene.background == "light" else dark
    grey = np.broadcast_to(np.asarray(level, dtype=np.float32), (scene.height, scene.width))
    return grey[:, :, None] + tint


def _paint(canvas: np.ndarray, scene_object: SceneObject, rng: np.random.Generator) -> None:
    """Blend one object into `canvas` float32[H, W, 3], in place."""
    height, width = canvas.shape[:2]
    radius = scene_object.radius * min(width, height)
    center_x, center_y = scene_object.x * width, scene_object.y * height
    # Only the object's surroundings are touched; two pixels more than its reach, for the smooth edge.
    reach = radius * 1.2 + 2
    rows = slice(max(0, int(center_y - reach)), min(height, int(center_y + reach) + 1))
    columns = slice(max(0, int(center_x - reach)), min(width, int(center_x + reach) + 1))
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5 - center_y
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + 0.5 - center_x
    cover = np.clip(0.5 - _distance(scene_object, x, y, radius), 0, 1)[:, :, None]
    color = np.array(PALETTE[scene_object.color]) + rng.uniform(-COLOR_SPREAD, COLOR_SPREAD, size=3)
    canvas[rows, columns] += cover * (color.astype(np.float32) - canvas[rows, columns])


def _distance(scene_object: SceneObject, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Pixels from the shape's edge, negative inside: float32[h, w] for x float32[1, w] and y float32[h, 1]."""
    cos, sin = np.cos(scene_object.angle), np.sin(scene_object.angle)
    half_width, half_height = (radius * extent for extent in _EXTENTS[scene_object.shape])
    return np.maximum(np.abs(cos * x + sin * y) - half_width, np.abs(cos * y - sin * x) - half_height)

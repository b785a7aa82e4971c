"""Draws one image of the demo data."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from dataset_tools.demo_shapes import CLASSES

SUPERSAMPLING = 2
SIDES_PX = (64, 128)
CLASS_NAMES = tuple(CLASSES)


def draw_jpeg(label: int, key: tuple[int, ...]) -> bytes:
    """A JPEG that shows one to five objects of class `label` (0–9); all else is random, by `key` alone."""
    rng = np.random.default_rng(key)
    short = rng.uniform(SIDES_PX[0], 104)
    long = min(short * rng.uniform(1, 4 / 3), SIDES_PX[1])
    size = (round(short), round(long)) if rng.random() < 0.5 else (round(long), round(short))
    width, height = (SUPERSAMPLING * side for side in size)
    canvas = background(rng, width, height)
    clutter(rng, canvas)
    count = int(rng.integers(1, 6))
    for center in spread_out(rng, count) * canvas.size:
        draw_object(rng, canvas, label, center, min(width, height) * rng.uniform(0.38, 0.62) / count**0.4)
    image = canvas.reduce(SUPERSAMPLING)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    encoded = BytesIO()
    image.save(encoded, "JPEG", quality=int(rng.integers(80, 95)))
    return encoded.getvalue()


def colors(rng: np.random.Generator, *shape: int) -> NDArray[np.uint8]:
    """Muted random colours, uint8 [*shape, 3]: vivid ones would tell an image without its objects."""
    vivid = rng.uniform(0, 255, (*shape, 3))
    gray = rng.uniform(0, 255, (*shape, 1))
    return (gray + rng.uniform(0.1, 0.4, (*shape, 1)) * (vivid - gray)).astype(np.uint8)


def color(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = colors(rng).tolist()
    return red, green, blue


def color_pair(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Two colours of brightnesses far enough apart that a pattern in them also shows in grayscale."""
    while True:
        first, second = color(rng), color(rng)
        if abs(np.subtract(first, second) @ (0.299, 0.587, 0.114)) > 60:
            return first, second


def gradient(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A smooth transition between four colours, one for each corner."""
    return Image.fromarray(colors(rng, 2, 2)).resize(size, Image.Resampling.BILINEAR)


def background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A gradient with smooth noise in all channels."""
    size = (width // SUPERSAMPLING, height // SUPERSAMPLING)  # smooth: it needs no more
    noise = Image.fromarray(colors(rng, 6, 6))
    noise = noise.resize(size, Image.Resampling.BICUBIC)
    picture = Image.blend(gradient(rng, size), noise, 0.2)
    return picture.resize((width, height), Image.Resampling.NEAREST)


def clutter(rng: np.random.Generator, canvas: Image.Image) -> None:
    """Lines and blobs of one colour each, which say nothing about the class."""
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(0, 5))):
        box = np.sort(rng.uniform(-0.1, 1.1, (2, 2)), axis=0) * canvas.size
        fill = color(rng)
        if rng.random() < 0.6:
            ends = box if rng.random() < 0.5 else box[:, [0, 1]] * (1, 0) + box[::-1] * (0, 1)
            pen.line([tuple(end) for end in ends], fill=fill, width=int(rng.integers(1, 9)))
        else:
            center, radii = box[0], rng.uniform(0.03, 0.15, 2) * min(canvas.size)
            pen.ellipse([*(center - radii), *(center + radii)], fill=fill)


def spread_out(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Points [count, 2] in [0.15, 0.85]², each one the farthest from those before it of six random ones."""
    points = rng.uniform(0.15, 0.85, (1, 2))
    for _ in range(count - 1):
        candidates = rng.uniform(0.15, 0.85, (6, 2))
        distances = np.linalg.norm(candidates[:, None] - points, axis=2).min(axis=1)
        points = np.concatenate([points, candidates[[distances.argmax()]]])
    return points


def draw_object(
    rng: np.random.Generator, canvas: Image.Image, label: int, center: NDArray[np.float64], radius: float
) -> None:
    """One object, turned, squeezed and partly over the edge at times. `center` [2] and `radius` in pixels."""
    outline, surface = CLASSES[CLASS_NAMES[label]]
    angle, squeeze = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1)
    matrix = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))]) * (1, squeeze) * radius

    left, top = np.maximum(np.floor(center - radius), 0).astype(int)
    right, bottom = np.minimum(np.ceil(center + radius) + 1, canvas.size).astype(int)
    corner = np.array([left, top])
    mask = Image.new("L", (int(right - left), int(bottom - top)))
    for polygon, fill in zip(outline, (255, 0), strict=False):
        points = polygon @ matrix.T + center - corner
        ImageDraw.Draw(mask).polygon([tuple(point) for point in points], fill=fill)

    inverse = np.linalg.inv(matrix).astype(np.float32)
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
    x, y = x - np.float32(center[0]), y - np.float32(center[1])
    period, phase = np.float32(rng.uniform(0.4, 0.7)), rng.uniform(-0.5, 0.5, 2).astype(np.float32)
    u = (inverse[0, 0] * x + inverse[0, 1] * y) / period + phase[0]
    v = (inverse[1, 0] * x + inverse[1, 1] * y) / period + phase[1]
    pattern = Image.fromarray((255 * surface(u, v)).astype(np.uint8))
    first, second = (Image.new("RGB", mask.size, pair) for pair in color_pair(rng))
    canvas.paste(Image.composite(first, second, pattern), (int(left), int(top)), mask)

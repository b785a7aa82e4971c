"""Draws one image of the demo data."""

from __future__ import annotations

from io import BytesIO

import numpy as np
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
    count = int(rng.choice([1, 2, 3, 4, 5], p=[0.2, 0.2, 0.2, 0.2, 0.2]))
    for radius in min(width, height) * rng.uniform(0.36, 0.6, size=count) / count**0.4:
        draw_object(rng, canvas, label, float(radius))
    image = canvas.reduce(SUPERSAMPLING)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    encoded = BytesIO()
    image.save(encoded, "JPEG", quality=int(rng.integers(80, 95)))
    return encoded.getvalue()


def color(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = map(int, rng.integers(0, 256, 3))
    return red, green, blue


def color_pair(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Two colours of brightnesses far enough apart that a pattern in them also shows in grayscale."""
    while True:
        first, second = color(rng), color(rng)
        if abs(np.subtract(first, second) @ (0.299, 0.587, 0.114)) > 60:
            return first, second


def gradient(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A smooth transition between four colours, one for each corner."""
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)


def background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A gradient with smooth noise in all channels."""
    size = (width // SUPERSAMPLING, height // SUPERSAMPLING)  # smooth: it needs no more
    noise = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    noise = noise.resize(size, Image.Resampling.BICUBIC)
    picture = Image.blend(gradient(rng, size), noise, 0.3)
    return picture.resize((width, height), Image.Resampling.NEAREST)


def clutter(rng: np.random.Generator, canvas: Image.Image) -> None:
    """Lines and blobs of one colour each, which say nothing about the class."""
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(0, 7))):
        box = np.sort(rng.uniform(-0.1, 1.1, (2, 2)), axis=0) * canvas.size
        fill = color(rng)
        if rng.random() < 0.6:
            ends = box if rng.random() < 0.5 else box[:, [0, 1]] * (1, 0) + box[::-1] * (0, 1)
            pen.line([tuple(end) for end in ends], fill=fill, width=int(rng.integers(1, 9)))
        else:
            center, radii = box[0], rng.uniform(0.03, 0.15, 2) * min(canvas.size)
            pen.ellipse([*(center - radii), *(center + radii)], fill=fill)


def draw_object(rng: np.random.Generator, canvas: Image.Image, label: int, radius: float) -> None:
    """One object, turned, squeezed and partly over the edge at times."""
    outline, surface = CLASSES[CLASS_NAMES[label]]
    center = rng.uniform(0.2, 0.8, 2) * canvas.size
    turn, squeeze = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1)
    matrix = np.array([(np.cos(turn), -np.sin(turn)), (np.sin(turn), np.cos(turn))]) * (1, squeeze) * radius

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

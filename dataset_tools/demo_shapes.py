"""The outlines and surfaces that tell the demo's ten classes apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]
Surface = Callable[[Floats, Floats], Floats]


def polar(radii: ArrayLike, rotation: float = 0.0) -> Floats:
    """The polygon [K, 2] with corners at K equal angles, the first one upwards but for `rotation` (1: all round)."""
    lengths = np.asarray(radii, dtype=np.float32)
    angles = 2 * np.pi * (np.arange(len(lengths)) / len(lengths) + rotation)
    return np.asarray(lengths[:, None] * np.stack([np.sin(angles), -np.cos(angles)], axis=1), np.float32)


def cross(arm: float = 0.36) -> Floats:
    corner = np.array([(-arm, -1), (arm, -1), (arm, -arm)], dtype=np.float32)
    quarter_turn = np.array([(0, 1), (-1, 0)], dtype=np.float32)
    corners = [corner @ np.linalg.matrix_power(quarter_turn, number) for number in range(4)]
    return np.concatenate(corners).astype(np.float32)


def crescent() -> Floats:
    outer, inner = np.linspace(0.22, 1.78, 40) * np.pi, np.linspace(1.7, 0.3, 40) * np.pi
    x = np.concatenate([np.cos(outer), 0.42 + 0.7 * np.cos(inner)])
    y = np.concatenate([np.sin(outer), 0.75 * np.sin(inner)])
    return np.stack([x, y], axis=1).astype(np.float32)


def heart() -> Floats:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return (np.stack([x, -y], axis=1) / 17).astype(np.float32)


def drop() -> Floats:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.stack([0.75 * np.sin(t) * np.sin(t / 2) ** 1.5, -np.cos(t)], axis=1).astype(np.float32)


CIRCLE = polar(np.ones(48))

# A surface maps (u, v), in units of its period, to a brightness in [0, 1].


def stripes(u: Floats, v: Floats) -> Floats:
    return _edge(np.sin(2 * np.pi * u))


def checks(u: Floats, v: Floats) -> Floats:
    return _edge(3 * np.sin(np.pi * u * 1.2) * np.sin(np.pi * v * 1.2))


def dots(u: Floats, v: Floats) -> Floats:
    row = np.floor(v * 1.1)
    x, y = np.mod(u * 1.1 + 0.5 * np.mod(row, 2), 1) - 0.5, v * 1.1 - row - 0.5
    return _edge(8 * (0.32 - np.hypot(x, y)))


def rings(u: Floats, v: Floats) -> Floats:
    return _edge(np.sin(2 * np.pi * np.hypot(u, v)))


def bricks(u: Floats, v: Floats) -> Floats:
    row = np.floor(v * 1.6)
    x, y = np.mod(u * 0.8 + 0.5 * np.mod(row, 2), 1), v * 1.6 - row
    return _edge(12 * np.minimum(np.minimum(x, 1 - x) / 0.8 - 0.12, np.minimum(y, 1 - y) / 1.6 - 0.1))


def zigzag(u: Floats, v: Floats) -> Floats:
    return _edge(np.sin(2 * np.pi * (u + 0.9 * np.abs(np.mod(v, 1) - 0.5))))


def grid(u: Floats, v: Floats) -> Floats:
    return _edge(9 * (np.minimum(np.abs(np.mod(u, 1) - 0.5), np.abs(np.mod(v, 1) - 0.5)) - 0.14))


def scales(u: Floats, v: Floats) -> Floats:
    row = np.floor(v * 1.4)
    x, y = np.mod(u + 0.5 * np.mod(row, 2), 1) - 0.5, v * 1.4 - row
    return np.asarray(np.mod(np.hypot(x * 1.6, y) * 1.1, 1), np.float32)


def speckles(u: Floats, v: Floats) -> Floats:
    cell_u, cell_v = np.floor(u * 5), np.floor(v * 5)
    return np.asarray(np.mod(np.abs(np.sin(cell_u * 12.9898 + cell_v * 78.233)) * 43758.547, 1), np.float32)


def shading(u: Floats, v: Floats) -> Floats:
    return np.asarray(np.clip(0.5 + 0.22 * u, 0, 1), np.float32)


def _edge(wave: NDArray[np.floating]) -> Floats:
    """Two brightnesses with a narrow ramp between: antialiased."""
    return np.asarray(np.clip(0.5 + 2 * wave, 0, 1), np.float32)


CLASSES: dict[str, tuple[tuple[Floats, ...], Surface]] = {
    "bricked_heart": ((heart(),), bricks),
    "checkered_square": ((polar([1, 1, 1, 1], rotation=1 / 8),), checks),
    "dotted_triangle": ((polar([1, 1, 1]),), dots),
    "grated_hexagon": ((polar([1] * 6),), grid),
    "ringed_crescent": ((crescent(),), rings),
    "scaly_drop": ((drop(),), scales),
    "shaded_star": ((polar([1, 0.45] * 5),), shading),
    "speckled_cross": ((cross(),), speckles),
    "striped_disc": ((CIRCLE,), stripes),
    "zigzag_ring": ((CIRCLE, 0.5 * CIRCLE), zigzag),
}
"""Class name → its outline (polygons within the unit circle; a second one is a hole) and its surface."""

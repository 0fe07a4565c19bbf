"""Drawn pictures like dermoscopy, so that tests and golden files need no patient's photograph.

Each class has some of the structures that textbooks of dermoscopy list for it, so that a tiny model can learn to
separate the drawings. Nothing learnt from them applies to skin. The same arguments give the same picture.
"""

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Field = NDArray[np.float32]  # (H, W), mostly in [0, 1]

# Six skins from light to dark (after Fitzpatrick I–VI), RGB.
SKINS = [(238, 205, 188), (229, 186, 163), (214, 168, 138), (190, 140, 108), (150, 103, 76), (112, 74, 56)]
CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")


class _Canvas:
    """An unfinished picture: `rgb` (H, W, 3) float in [0, 255]; `x`, `y` in shorter sides from the middle."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self.rng, (self.width, self.height) = rng, size
        self.unit = float(min(size))
        y, x = np.mgrid[: self.height, : self.width].astype(np.float32)
        self.x, self.y = (x - self.width / 2) / self.unit, (y - self.height / 2) / self.unit
        self.rgb = np.zeros((self.height, self.width, 3), np.float32)

    def noise(self, cells: float, octaves: int = 3) -> Field:
        """Return smooth noise in [0, 1] with about `cells` blobs along the shorter side."""
        total = np.zeros((self.height, self.width), np.float32)
        for octave in range(octaves):
            n = cells * 2**octave / self.unit
            grid = self.rng.random((max(2, round(self.height * n) + 1), max(2, round(self.width * n) + 1)))
            total += cv2.resize(grid.astype(np.float32), (self.width, self.height), interpolation=cv2.INTER_CUBIC) / (
                2**octave
            )
        return np.asarray((total - total.min()) / (np.ptp(total) + 1e-6), np.float32)

    def paint(self, colour: tuple[float, ...], alpha: Field) -> None:
        self.rgb += (np.asarray(colour, np.float32) - self.rgb) * np.clip(alpha, 0, 1)[..., None]

    def spots(self, where: Field, count: int, radius: tuple[float, float], soft: float = 0.35) -> Field:
        """Draw `count` roundish spots (radii in shorter sides) with their centres inside `where` (> 0.5)."""
        mask, inside = np.zeros_like(where), np.argwhere(where > 0.5)
        for row, column in inside[self.rng.integers(0, len(inside), count)] if len(inside) else []:
            a, b, turn = self.rng.uniform(*radius), self.rng.uniform(0.75, 1.3), self.rng.uniform(0, np.pi)
            reach = int(1.4 * a * self.unit) + 2
            near = np.s_[max(0, row - reach) : row + reach, max(0, column - reach) : column + reach]
            dx, dy = self.x[near] - self.x[row, column], self.y[near] - self.y[row, column]
            u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
            np.maximum(mask[near], _step(1 - np.hypot(u, v * b) / a, soft), out=mask[near])
        return mask

    def lines(self, strokes: list[NDArray[np.float64]], thickness: float) -> Field:
        """Draw anti-aliased polylines through points (N, 2) given in shorter sides from the middle."""
        scale = 3  # drawn larger and shrunk, as OpenCV has whole-pixel widths only
        mask = np.zeros((self.height * scale, self.width * scale), np.uint8)
        for points in strokes:
            pixels = (points * self.unit + [self.width / 2, self.height / 2]) * scale
            width = max(1, round(thickness * self.unit * scale))
            cv2.polylines(mask, [pixels.round().astype(np.int32)], False, 255, width, cv2.LINE_AA)
        small = cv2.resize(mask, (self.width, self.height), interpolation=cv2.INTER_AREA)
        return np.asarray(small / 255, np.float32)

    def walk(self, start: tuple[float, float], heading: float, length: float, wander: float) -> NDArray[np.float64]:
        """Return a wandering curve of about `length`, as points (24, 2)."""
        angles = heading + np.cumsum(self.rng.normal(0, wander, 24))
        steps = np.stack([np.cos(angles), np.sin(angles)], 1) * length / 24
        return np.asarray(start) + np.cumsum(steps, 0)


def _step(value: Field, softness: float) -> Field:
    """Rise smoothly from 0 to 1 as `value` goes from 0 to `softness`."""
    t = np.clip(value / softness, 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def _shape(c: _Canvas, radius: float, irregular: float, aspect: float) -> Field:
    """Return the depth inside an irregular closed outline: 1 in the middle, 0 on the border, negative outside."""
    turn, (cx, cy) = c.rng.uniform(0, 2 * np.pi), c.rng.uniform(-0.05, 0.05, 2)
    dx = c.x - cx + (c.noise(5, 5) - 0.5) * (0.03 + irregular * 0.4)
    dy = c.y - cy + (c.noise(5, 5) - 0.5) * (0.03 + irregular * 0.4)
    u, v = dx * np.cos(turn) + dy * np.sin(turn), (dy * np.cos(turn) - dx * np.sin(turn)) * aspect
    angle, outline = np.arctan2(v, u), np.ones_like(c.x)
    for k in range(2, 8):
        outline += c.rng.normal(0, irregular / k) * np.cos(k * angle + c.rng.uniform(0, 2 * np.pi))
    return np.asarray(1 - np.hypot(u, v) / (radius * np.clip(outline, 0.45, 1.7)), np.float32)


def _network(c: _Canvas, mesh: float, disorder: float) -> Field:
    """Draw the pigment network: dark lines of a honeycomb with `mesh` holes along the shorter side."""
    wx, wy = (c.noise(5) - 0.5) * disorder * 0.12, (c.noise(5) - 0.5) * disorder * 0.12
    k = 2 * np.pi * mesh
    waves = sum(np.cos(k * ((c.x + wx) * np.cos(a) + (c.y + wy) * np.sin(a))) for a in (0.3, 0.3 + 2.094, 0.3 + 4.189))
    return np.asarray(1 - _step(np.asarray(waves, np.float32) + 1.5, 1.9), np.float32)


def _skin(c: _Canvas) -> tuple[int, int, int]:
    tone = SKINS[c.rng.choice(6, p=[0.22, 0.28, 0.22, 0.13, 0.09, 0.06])]
    c.rgb[:] = tone
    c.paint((tone[0] * 1.02, tone[1] * 0.86, tone[2] * 0.86), (c.noise(3) - 0.35) * 0.9)  # blood under it
    furrows = np.abs(c.noise(34, 2) - 0.5) * 2  # the skin's fine lines: the zero crossings of noise
    c.rgb *= (0.972 + 0.035 * _step(furrows, 0.5) + 0.05 * (c.noise(70, 2) - 0.5))[..., None]
    return tone


def _lesion(c: _Canvas, code: str, tone: tuple[int, int, int]) -> None:
    rng, dark = c.rng, 0.55 + 0.45 * sum(tone) / 630  # pigment is darker on darker skin
    brown, black = (134 * dark, 70 * dark, 40 * dark), (52 * dark, 30 * dark, 26 * dark)
    blue, pink, white = (92, 98, 122), (206, 112, 108), (238, 220, 214)
    radius, irregular, aspect, soft = {
        "MEL": (0.33, 0.30, 1.25, 0.20), "NV": (0.25, 0.12, 1.15, 0.30), "BCC": (0.27, 0.18, 1.15, 0.30),
        "AK": (0.31, 0.26, 1.20, 0.60), "BKL": (0.29, 0.18, 1.20, 0.09), "DF": (0.27, 0.10, 1.05, 0.60),
        "VASC": (0.22, 0.14, 1.10, 0.12), "SCC": (0.28, 0.20, 1.10, 0.25)}[code]  # fmt: skip
    depth = _shape(c, radius * rng.uniform(0.85, 1.15), irregular, aspect)
    body, core = _step(depth, soft), _step(depth - 0.35, 0.4)
    rim = body * (1 - _step(depth - 0.16, 0.18))
    if code == "NV":
        c.paint(brown, body * (0.55 + 0.35 * c.noise(7)))
        c.paint(black, body * core * (0.15 + 0.4 * c.noise(5)))
        c.paint(black, _network(c, rng.uniform(20, 26), 0.9) * body * (0.25 + 0.3 * c.noise(6)))
        c.paint(black, c.spots(_step(depth - 0.2, 0.05), int(rng.integers(10, 40)), (0.006, 0.012), 0.9) * 0.6)
    elif code == "MEL":
        c.paint(brown, body * (0.6 + 0.4 * c.noise(7, 4)))
        c.paint(black, body * _step(c.noise(3, 5) - 0.42, 0.3) * 0.95)
        c.paint(black, _network(c, rng.uniform(13, 17), 2.0) * body * _step(c.noise(3) - 0.4, 0.3) * 0.6)
        c.paint(blue, body * core * _step(c.noise(3, 5) - 0.45, 0.3) * 0.85)  # blue-white veil
        c.paint(white, body * _step(c.noise(3, 5) - 0.62, 0.3) * 0.7)  # regression
        edge = np.argwhere(np.abs(depth) < 0.03)
        starts = [(float(c.x[i, j]), float(c.y[i, j])) for i, j in edge[rng.integers(0, len(edge), 18)]]
        streaks = [c.walk(s, float(np.arctan2(s[1], s[0])), rng.uniform(0.01, 0.03), 0.1) for s in starts]
        c.paint(brown, cv2.GaussianBlur(c.lines(streaks, 0.014), (0, 0), 0.004 * c.unit) * 0.9)
        c.paint(black, c.spots(body, 30, (0.005, 0.015), 0.8) * 0.85)
    elif code == "BCC":
        c.paint((228, 160, 158), body * (0.55 + 0.3 * c.noise(6)))
        c.paint(blue, c.spots(_step(depth - 0.15, 0.05), int(rng.integers(6, 12)), (0.022, 0.06), 0.7) * 0.9)
        c.paint((196, 70, 66), _vessels(c, depth, 7, branches=4) * 0.85)
        c.paint((150, 52, 44), c.spots(core, 2, (0.025, 0.05), 0.8) * 0.7)  # erosion
        c.paint(white, body * _step(c.noise(9, 4) - 0.55, 0.3) * 0.7)
    elif code == "AK":
        c.paint(pink, body * (0.55 + 0.35 * c.noise(8)))
        follicles = c.spots(body, 50, (0.012, 0.020), 0.7)
        c.paint((240, 208, 166), follicles * 0.7)
        c.paint(pink, c.spots(follicles, 40, (0.004, 0.006)) * 0.8)
        c.paint(white, body * _step(c.noise(20, 3) - 0.55, 0.2) * 0.8)  # scale
    elif code == "BKL":
        c.paint((176 * dark, 124 * dark, 76 * dark), body * (0.6 + 0.35 * c.noise(8, 4)))
        fissures = _step(0.10 - np.abs(c.noise(9, 2) - 0.5), 0.10)
        c.paint(brown, fissures * body * 0.55)
        inner = _step(depth - 0.1, 0.05)
        c.paint((255, 244, 214), c.spots(inner, int(rng.integers(14, 26)), (0.006, 0.015), 0.7) * 0.95)
        c.paint(black, c.spots(inner, 9, (0.010, 0.020), 0.7) * 0.8)
        c.paint(brown, rim * 0.5)
    elif code == "DF":
        c.paint((190 * dark, 122 * dark, 100 * dark), body * (0.6 + 0.3 * c.noise(6)))
        c.paint(brown, _network(c, rng.uniform(24, 30), 0.6) * body * (1 - core) * 0.5)
        scar = _step(depth - 0.3 + 0.25 * (c.noise(7, 4) - 0.5), 0.5)  # white in the middle, with bright lines
        c.paint((246, 226, 220), scar * (0.55 + 0.45 * c.noise(14)))
    elif code == "VASC":
        c.paint((196, 84, 84), body * 0.55)
        lagoons = c.spots(_step(depth - 0.1, 0.05), int(rng.integers(22, 34)), (0.022, 0.055), 0.6)
        c.paint((166, 24, 52), lagoons * (0.7 + 0.3 * c.noise(8)))
        c.paint((84, 22, 74), c.spots(core, 7, (0.025, 0.05), 0.7) * 0.8)
    elif code == "SCC":
        c.paint((214, 120, 110), body * 0.85)
        c.paint((190, 44, 44), _vessels(c, depth, 34, branches=0) * 0.9)
        c.paint((232, 198, 122), core * (0.65 + 0.35 * c.noise(14)))  # keratin
        c.paint((120, 44, 34), core * _step(c.noise(6) - 0.62, 0.08) * 0.9)  # crust of blood
        c.paint(white, rim * _step(c.noise(10) - 0.45, 0.1) * 0.75)


def _vessels(c: _Canvas, depth: Field, count: int, branches: int) -> Field:
    """Draw vessels inside the lesion: long trees with `branches`, or short hairpins near the border with none."""
    inside = np.argwhere((depth > 0.05) & (depth < (0.9 if branches else 0.45)))
    strokes, twigs = [], []
    for i, j in inside[c.rng.integers(0, len(inside), count)] if len(inside) else []:
        heading = c.rng.uniform(0, 2 * np.pi)
        stem = c.walk((c.x[i, j], c.y[i, j]), heading, 0.22 if branches else 0.035, 0.16 if branches else 0.3)
        strokes.append(stem)
        for _ in range(branches):
            twigs.append(c.walk(tuple(stem[c.rng.integers(4, 20)]), heading + c.rng.normal(0, 0.9), 0.09, 0.2))
    return np.maximum(c.lines(strokes, 0.007), c.lines(twigs, 0.004)) * _step(depth, 0.1)


def _clutter(c: _Canvas) -> None:
    """Draw hairs, gel bubbles and a ruler, each in some pictures."""
    if c.rng.random() < 0.6:
        hairs = [c.walk(tuple(c.rng.uniform(-0.8, 0.8, 2)), c.rng.uniform(0, np.pi), c.rng.uniform(0.4, 1.1), 0.05)
                 for _ in range(c.rng.integers(2, 12))]  # fmt: skip
        c.paint((52, 36, 30), c.lines(hairs, 0.0055) * 0.85)
    if c.rng.random() < 0.4:
        for _ in range(c.rng.integers(2, 6)):
            (x, y), r = c.rng.uniform(-0.6, 0.6, 2), c.rng.uniform(0.012, 0.035)
            ring = np.exp(-(((np.hypot(c.x - x, c.y - y) - r) / (0.12 * r + 1 / c.unit)) ** 2))
            c.paint((255, 250, 244), np.asarray(ring * (0.3 + 0.4 * (c.x - x < 0)), np.float32))
    if c.rng.random() < 0.3:
        ticks = [np.array([[t, 0.5], [t, 0.5 - (0.06 if n % 5 == 0 else 0.03)]])
                 for n, t in enumerate(np.arange(-0.9, 0.9, 0.05))]  # fmt: skip
        c.paint((40, 38, 40), c.lines(ticks, 0.004) * 0.85)


def draw_lesion(seed: int, code: str = "NV", size: tuple[int, int] = (600, 450)) -> Image.Image:
    """Draw one RGB picture of a class of CLASSES, of `size` (width, height). Raises ValueError for another class."""
    number = CLASSES.index(code)
    c = _Canvas(np.random.default_rng([seed, number]), size)
    _lesion(c, code, _skin(c))
    _clutter(c)
    c.rgb[:] = cv2.GaussianBlur(c.rgb, (0, 0), max(0.3, 0.0016 * c.unit))  # no lens draws as sharply as a formula
    camera = np.random.default_rng([seed, number, 0])
    c.rgb *= camera.uniform(0.95, 1.04, 3).astype(np.float32)  # no two cameras agree on white
    c.rgb *= 1 - 0.30 * _step(np.hypot(c.x, c.y) - 0.35, 0.75)[..., None]  # the lens's vignette
    c.rgb += camera.normal(0, 2.2, c.rgb.shape).astype(np.float32)  # the sensor's grain
    return Image.fromarray(np.clip(c.rgb, 0, 255).astype(np.uint8))

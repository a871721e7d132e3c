"""Drawing of the ground and of everything on an airfield that is not a plane."""

from __future__ import annotations

import cv2
import numpy as np

GROUNDS = ((96, 112, 72), (122, 118, 88), (150, 138, 110), (84, 98, 78), (168, 158, 136))
ROOFS = ((176, 178, 182), (150, 96, 80), (208, 208, 204), (110, 116, 124), (188, 170, 140), (236, 236, 232))
CARS = ((235, 235, 235), (30, 30, 34), (180, 30, 30), (40, 70, 150), (220, 190, 60), (130, 134, 138))


def noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise (size, size) float32 in about -1..1 with ``cells`` bumps a side."""
    small = rng.standard_normal((cells, cells)).astype(np.float32)
    return cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)


def ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """Textured open ground (size, size, 3) float32 with a few fields of other colour."""
    base = np.array(GROUNDS[rng.integers(len(GROUNDS))], np.float32)
    image = np.tile(base, (size, size, 1))
    for _ in range(rng.integers(2, 6)):
        field = np.array(GROUNDS[rng.integers(len(GROUNDS))], np.float32)
        centre, extent = rng.uniform(0, size, 2), rng.uniform(size * 0.1, size * 0.4, 2)
        cv2.fillPoly(image, [_rectangle(centre, extent, rng.uniform(0, np.pi))], (base * 0.5 + field * 0.5).tolist())
    texture = 9 * noise(rng, size, 6) + 6 * noise(rng, size, 30) + 5 * noise(rng, size, 140)
    image += texture[:, :, None]
    image += 4 * noise(rng, size, 9)[:, :, None] * np.array([1.0, -0.4, -0.6], np.float32)
    return image


def pavement(rng: np.random.Generator, image: np.ndarray, centre: np.ndarray, *, extent: np.ndarray, angle: float) -> None:
    """Draw concrete or asphalt with slab joints, stains and a taxi line into ``image``."""
    size = len(image)
    tone = rng.uniform(105, 190)
    tint = np.array([tone, tone * rng.uniform(0.97, 1.0), tone * rng.uniform(0.93, 1.0)])
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, [_rectangle(centre, extent, angle)], 1)
    texture = 3.0 * noise(rng, size, 24) + 4.0 * noise(rng, size, 220)
    inside = mask.astype(bool)
    image[inside] = (tint + texture[:, :, None])[inside]
    across, along = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    layer = image.copy()
    slab = rng.uniform(18, 46)
    for direction, other, reach, count in (
        (across, along, extent[0], extent[1] / slab),
        (along, across, extent[1], extent[0] / slab),
    ):
        for step in np.arange(-count / 2, count / 2):
            middle = centre + other * step * slab
            _line(layer, middle - direction * reach / 2, middle + direction * reach / 2, tint * 0.88, 1)
    for _ in range(rng.integers(3, 12)):
        spot = centre + across * rng.uniform(-0.5, 0.5) * extent[0] + along * rng.uniform(-0.5, 0.5) * extent[1]
        cv2.circle(layer, _point(spot), int(rng.integers(2, 9)), (tint * rng.uniform(0.55, 0.85)).tolist(), -1)
    image[inside] = layer[inside]
    _line(image, centre - across * extent[0] / 2, centre + across * extent[0] / 2, (214, 182, 60), int(rng.integers(1, 3)))


def runway(rng: np.random.Generator, image: np.ndarray, centre: np.ndarray, *, angle: float, width: float) -> None:
    """Draw a runway across the whole scene: dark asphalt, edge lines, dashes, threshold bars, tyre marks."""
    size = len(image)
    extent = np.array([size * 3.0, width])
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, [_rectangle(centre, extent, angle)], 1)
    tone = rng.uniform(62, 110)
    image[mask.astype(bool)] = (tone + 4 * noise(rng, size, 200)[:, :, None] + np.zeros(3))[mask.astype(bool)]
    across, along = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    white = (226, 226, 222)
    for offset in (-0.45, 0.45):
        middle = centre + along * offset * width
        _line(image, middle - across * size * 1.5, middle + across * size * 1.5, white, 2)
    for step in np.arange(-size * 1.5, size * 1.5, 72):
        _line(image, centre + across * step, centre + across * (step + 36), white, 3)
    start = rng.uniform(-0.4, 0.4) * size
    for offset in np.linspace(-0.36, 0.36, 8):
        middle = centre + along * offset * width + across * start
        _line(image, middle, middle + across * 42, white, 4)
    for _ in range(rng.integers(4, 10)):
        offset, begin = rng.normal(0, 0.08) * width, rng.uniform(-0.8, 0.8) * size
        middle = centre + along * offset + across * begin
        _line(image, middle, middle + across * rng.uniform(60, 260), (tone * 0.7,) * 3, 2)


def building(
    rng: np.random.Generator, image: np.ndarray, centre: np.ndarray, extent: np.ndarray, *, angle: float, shadow: np.ndarray
) -> np.ndarray:
    """Draw a roof with ridge, roof units and a cast shadow; return its footprint, bool (H, W)."""
    footprint = np.zeros(image.shape[:2], np.uint8)
    roof = _rectangle(centre, extent, angle)
    cv2.fillPoly(footprint, [roof], 1)
    shade = np.zeros(image.shape[:2], np.uint8)
    for share in np.linspace(0, 1, 5):
        cv2.fillPoly(shade, [_rectangle(centre + shadow * share, extent, angle)], 1)
    image[(shade > 0) & (footprint == 0)] *= 0.5
    colour = np.array(ROOFS[rng.integers(len(ROOFS))], np.float32)
    cv2.fillPoly(image, [roof], colour.tolist())
    across, along = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    half = _rectangle(centre + along * extent[1] / 4, np.array([extent[0], extent[1] / 2]), angle)
    cv2.fillPoly(image, [half], (colour * rng.uniform(0.78, 0.95)).tolist())
    for _ in range(rng.integers(0, 7)):
        unit = centre + across * rng.uniform(-0.4, 0.4) * extent[0] + along * rng.uniform(-0.4, 0.4) * extent[1]
        box = _rectangle(unit, rng.uniform(4, 12, 2), angle)
        cv2.fillPoly(image, [box], (colour * rng.uniform(0.5, 1.1)).clip(0, 255).tolist())
    return footprint.astype(bool)


def vehicle(rng: np.random.Generator, image: np.ndarray, centre: np.ndarray, *, angle: float, shadow: np.ndarray) -> None:
    """Draw a car, bus or tug with a windscreen and a short shadow."""
    length = rng.choice([rng.uniform(6, 10), rng.uniform(13, 24)])
    extent = np.array([length, rng.uniform(3.2, 6.0)])
    image_shadow = np.zeros(image.shape[:2], np.uint8)
    cv2.fillPoly(image_shadow, [_rectangle(centre + shadow * 0.2, extent, angle)], 1)
    image[image_shadow.astype(bool)] *= 0.6
    colour = np.array(CARS[rng.integers(len(CARS))], np.float32)
    cv2.fillPoly(image, [_rectangle(centre, extent, angle)], colour.tolist())
    front = centre + np.array([np.cos(angle), np.sin(angle)]) * length * 0.22
    cv2.fillPoly(image, [_rectangle(front, extent * [0.16, 0.8], angle)], (50, 56, 64))


def distractor(rng: np.random.Generator, image: np.ndarray, centre: np.ndarray, *, size: float, shadow: np.ndarray) -> None:
    """Draw something plane-like that is none: painted cross, T-shaped roof, helicopter, wind turbine, bare fuselage."""
    kind, angle = int(rng.integers(5)), float(rng.uniform(0, 2 * np.pi))
    a, b = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    pale = np.array(ROOFS[rng.integers(len(ROOFS))], np.float32)
    if kind == 0:
        for direction in (a, b):
            _line(
                image, centre - direction * size / 2, centre + direction * size / 2, (228, 224, 214), max(int(size / 9), 2)
            )
    elif kind == 1:
        for middle, extent in (
            (centre, np.array([size, size * 0.26])),
            (centre + a * size * 0.4, np.array([size * 0.26, size])),
        ):
            cv2.fillPoly(image, [_rectangle(middle + shadow * 0.5, extent, angle)], (60, 60, 58))
            cv2.fillPoly(image, [_rectangle(middle, extent, angle)], pale.tolist())
    elif kind == 2:
        cv2.ellipse(
            image, _point(centre), (int(size * 0.2), max(int(size * 0.1), 2)), np.degrees(angle), 0, 360, (66, 72, 66), -1
        )
        _line(image, centre, centre - a * size * 0.5, (66, 72, 66), max(int(size / 14), 1))
        for turn in (0.4, 0.4 + np.pi / 2):
            blade = np.array([np.cos(angle + turn), np.sin(angle + turn)])
            _line(image, centre - blade * size * 0.45, centre + blade * size * 0.45, (46, 48, 48), 1)
    elif kind == 3:
        for turn in (0, 2 * np.pi / 3, 4 * np.pi / 3):
            blade = np.array([np.cos(angle + turn), np.sin(angle + turn)])
            _line(image, centre + shadow, centre + shadow + blade * size * 0.5, (70, 72, 66), 2)
            _line(image, centre, centre + blade * size * 0.5, (236, 238, 238), 2)
        cv2.circle(image, _point(centre), 3, (240, 240, 240), -1)
    else:
        cv2.ellipse(
            image,
            _point(centre + shadow * 0.3),
            (int(size * 0.5), max(int(size * 0.06), 2)),
            np.degrees(angle),
            0,
            360,
            (70, 70, 68),
            -1,
        )
        cv2.ellipse(
            image, _point(centre), (int(size * 0.5), max(int(size * 0.06), 2)), np.degrees(angle), 0, 360, pale.tolist(), -1
        )


def _rectangle(centre: np.ndarray, extent: np.ndarray, angle: float) -> np.ndarray:
    half = np.asarray(extent) / 2
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return np.round(corners @ turn + centre).astype(np.int32)


def _point(xy: np.ndarray) -> tuple[int, int]:
    return int(round(float(xy[0]))), int(round(float(xy[1])))


def _line(image: np.ndarray, start: np.ndarray, end: np.ndarray, colour, thickness: int) -> None:
    cv2.line(image, _point(start), _point(end), [float(c) for c in colour], thickness)

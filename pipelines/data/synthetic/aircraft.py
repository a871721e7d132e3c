"""Drawing of aircraft seen from above: exact coverage and colour patches; numpy and OpenCV only."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

# Patches are drawn this many times larger and averaged down, so that edges are
# smooth and the mask (coverage of one half or more) is exact to the pixel.
SUPERSAMPLE = 4

LIVERIES = (
    ((235, 236, 238), (215, 216, 220)),
    ((246, 246, 246), (40, 70, 150)),
    ((240, 240, 240), (170, 40, 45)),
    ((198, 201, 205), (150, 154, 160)),
    ((140, 146, 150), (110, 116, 120)),
    ((92, 98, 88), (75, 80, 70)),
    ((70, 74, 80), (58, 62, 68)),
    ((236, 226, 200), (200, 120, 30)),
    ((225, 228, 232), (20, 110, 80)),
)
# Most aircraft are white or light gray; military gray, olive and near black are the exceptions.
LIVERY_SHARES = (0.24, 0.18, 0.14, 0.12, 0.05, 0.04, 0.03, 0.1, 0.1)


@dataclass(frozen=True)
class Aircraft:
    """Shape in units of its own length, nose towards +x; all numbers are fractions of the length."""

    fuselage: float
    span: float
    sweep: float
    root_chord: float
    tip_chord: float
    wing_x: float
    tail_span: float
    tail_sweep: float
    engines: int
    engine_at_tail: bool
    livery: tuple[tuple[int, int, int], tuple[int, int, int]]


# Airliners, business jets, propellers, of each other.
FAMILIES = (0.5, 0.2, 0.18)
FIGHTERS = 0.12


def random_aircraft(rng: np.random.Generator, fighters: float = FIGHTERS) -> Aircraft:
    """Draw one of four families (airliner, business jet, propeller, fighter) with random proportions.

    Args:
        fighters: share of fighters; the other families keep their shares among themselves.
    """
    livery = LIVERIES[rng.choice(len(LIVERIES), p=LIVERY_SHARES)]
    others = [share * (1 - fighters) / sum(FAMILIES) for share in FAMILIES]
    family = rng.choice(4, p=[*others, fighters])
    u = rng.uniform
    if family == 0:
        return Aircraft(
            fuselage=u(0.09, 0.125),
            span=u(0.86, 1.06),
            sweep=u(0.42, 0.7),
            root_chord=u(0.19, 0.25),
            tip_chord=u(0.05, 0.08),
            wing_x=u(0.02, 0.12),
            tail_span=u(0.32, 0.42),
            tail_sweep=u(0.3, 0.6),
            engines=int(rng.choice([2, 2, 4])),
            engine_at_tail=False,
            livery=livery,
        )
    if family == 1:
        return Aircraft(
            fuselage=u(0.09, 0.12),
            span=u(0.82, 1.0),
            sweep=u(0.25, 0.5),
            root_chord=u(0.15, 0.2),
            tip_chord=u(0.05, 0.08),
            wing_x=u(-0.04, 0.05),
            tail_span=u(0.34, 0.44),
            tail_sweep=u(0.2, 0.5),
            engines=2,
            engine_at_tail=True,
            livery=livery,
        )
    if family == 2:
        return Aircraft(
            fuselage=u(0.11, 0.15),
            span=u(1.05, 1.35),
            sweep=u(0.0, 0.1),
            root_chord=u(0.16, 0.22),
            tip_chord=u(0.11, 0.16),
            wing_x=u(0.08, 0.18),
            tail_span=u(0.36, 0.46),
            tail_sweep=u(0.0, 0.15),
            engines=int(rng.choice([0, 2])),
            engine_at_tail=False,
            livery=livery,
        )
    return Aircraft(
        fuselage=u(0.1, 0.15),
        span=u(0.6, 0.75),
        sweep=u(0.7, 1.0),
        root_chord=u(0.36, 0.46),
        tip_chord=u(0.06, 0.12),
        wing_x=u(-0.02, 0.06),
        tail_span=u(0.32, 0.4),
        tail_sweep=u(0.5, 0.9),
        engines=0,
        engine_at_tail=False,
        livery=LIVERIES[int(rng.integers(3, 7))],
    )


def outline(plane: Aircraft) -> list[tuple[str, np.ndarray]]:
    """Outline a plane's wings, tail, engines and body as (name, polygon (K, 2)), in units of its length, centre at 0, 0."""
    w = plane.fuselage / 2
    t = np.linspace(np.pi / 2, -np.pi / 2, 9)
    nose = np.stack([0.36 + 0.14 * np.cos(t), w * np.sin(t)], axis=1)
    body = np.concatenate([nose, [[-0.3, -w], [-0.48, -w * 0.25], [-0.48, w * 0.25], [-0.3, w]]])
    polygons = []
    for side in (1, -1):
        half = plane.span / 2
        lead, back = plane.wing_x + plane.root_chord / 2, plane.sweep * half
        wing = [
            [lead, 0],
            [lead - back, half],
            [lead - back - plane.tip_chord, half],
            [lead - plane.root_chord, side * 0 + w * 0.8],
            [lead - plane.root_chord, 0],
        ]
        polygons.append(("wing", np.array(wing) * [1, side]))
        half = plane.tail_span / 2
        back = plane.tail_sweep * half
        tail = [[-0.34, 0], [-0.36 - back, half], [-0.42 - back, half], [-0.47, 0]]
        polygons.append(("tail", np.array(tail) * [1, side]))
        for number in range(plane.engines // 2):
            reach = w + 0.015 if plane.engine_at_tail else plane.span * (0.17 + 0.15 * number)
            front = -0.18 if plane.engine_at_tail else lead - plane.sweep * reach + 0.05
            box = np.array([[0, -0.022], [0, 0.022], [-0.11, 0.018], [-0.11, -0.018]]) + [front, reach]
            polygons.append(("engine", box * [1, side]))
    fin = np.array([[-0.3, 0], [-0.47, 0.012], [-0.5, 0.012], [-0.5, -0.012], [-0.47, -0.012]])
    return [*polygons, ("body", body), ("fin", fin)]


@dataclass(frozen=True)
class Patch:
    """A drawn object: coverage (h, w) float32 in 0..1, colour (h, w, 3) float32, top-left corner in the scene."""

    coverage: np.ndarray
    colour: np.ndarray
    left: int
    top: int

    @property
    def mask(self) -> np.ndarray:
        """The pixels that belong to the object: at least half covered."""
        return self.coverage >= 0.5


def draw_aircraft(
    plane: Aircraft, centre_xy: tuple[float, float], length: float, heading: float, light: np.ndarray
) -> Patch:
    """Draw a plane of ``length`` pixels at a sub-pixel centre, nose at ``heading`` radians.

    ``light`` is the unit vector (2,) towards the sun: the half of the fuselage away from it is darker.
    """
    polygons = outline(plane)
    corners = np.concatenate([p for _, p in polygons])
    radius = float(np.abs(corners).max()) * length * np.sqrt(2) + 2
    left, top = int(np.floor(centre_xy[0] - radius)), int(np.floor(centre_xy[1] - radius))
    size = int(np.ceil(2 * radius)) + 2
    big = size * SUPERSAMPLE
    turn = np.array([[np.cos(heading), np.sin(heading)], [-np.sin(heading), np.cos(heading)]])

    def pixels(points: np.ndarray) -> np.ndarray:
        placed = points * length @ turn + np.asarray(centre_xy) - [left, top]
        return np.round(placed * SUPERSAMPLE).astype(np.int32)

    cover = np.zeros((big, big), np.uint8)
    colour = np.zeros((big, big, 3), np.float32)
    main, accent = (np.array(c, np.float32) for c in plane.livery)
    for name, points in polygons:
        shade = {"wing": main * 0.94, "tail": main * 0.9, "engine": main * 0.72, "body": main, "fin": accent}[name]
        cv2.fillPoly(cover, [pixels(points)], 255)
        cv2.fillPoly(colour, [pixels(points)], shade.tolist())
        if name == "body":
            across = turn[1]
            side = 1.0 if float(across @ light) < 0 else -1.0
            dark = points * [1, 1]
            dark[:, 1] = np.where(dark[:, 1] * side > 0, dark[:, 1], 0)
            cv2.fillPoly(colour, [pixels(dark)], (shade * 0.84).tolist())
            window = np.array([[0.45, -0.02], [0.45, 0.02], [0.42, 0.03], [0.42, -0.03]])
            cv2.fillPoly(colour, [pixels(window)], (45, 50, 60))
    coverage = cv2.resize(cover, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    averaged = cv2.resize(colour, (size, size), interpolation=cv2.INTER_AREA)
    # Colour was averaged together with the black around the plane: undo that.
    restored = averaged / np.maximum(coverage, 1e-3)[:, :, None]
    return Patch(coverage, restored.clip(0, 255), left, top)

"""Rendered scenes: the embedded data set of `make demo` (Pillow only, seeded, the same on every machine).

A scene is one to three objects with shape, colour, fill and size, their arrangement, and a background. Scenes are
canonical ('A above B' and 'B below A' are one scene), and a stable hash of the scene decides its split, so that
any number of training images stays disjoint from the test.
"""

import math
import random
import zlib
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw

SHAPES = ('circle', 'square', 'triangle', 'star', 'heart', 'cross')
COLOURS = {'red': (222, 40, 44), 'orange': (247, 142, 30), 'yellow': (240, 220, 50), 'green': (48, 160, 62),
           'blue': (42, 84, 214), 'purple': (140, 50, 172), 'pink': (246, 140, 190)}
BACKGROUNDS = {'white': (246, 246, 246), 'gray': (150, 150, 150), 'black': (26, 26, 26), 'cream': (236, 222, 184)}
FILLS = ('solid', 'striped', 'outlined')
SIZES = {'small': 16, 'large': 27}  # radius in pixels of a 128 px image
PLACES = {'center': (64, 64), 'top left': (36, 36), 'top right': (92, 36), 'bottom left': (36, 92),
          'bottom right': (92, 92)}
# Arrangements by kind of scene; objects are listed left to right, top to bottom, or inner before outer.
ARRANGEMENTS = {'single': tuple(PLACES), 'group': ('row', 'column'), 'pair': ('above', 'left', 'inside'),
                'triple': ('row', 'column')}
KINDS = {'single': 0.10, 'group': 0.12, 'pair': 0.48, 'triple': 0.30}
SIDE = 128  # pixels of a rendered image
SUPERSAMPLING = 2


@dataclass(frozen=True)
class Thing:
    """An object. `size` is None where it carries no information (groups, triples, one inside the other)."""

    shape: str
    colour: str
    fill: str = 'solid'
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """Canonical scene; a group of `count` equal things lists the thing once."""

    kind: str
    arrangement: str
    things: tuple[Thing, ...]
    background: str
    count: int = 1

    @property
    def key(self) -> str:
        things = ';'.join(f'{t.size} {t.fill} {t.colour} {t.shape}' for t in self.things)
        return f'{self.kind}|{self.arrangement}|{self.count}|{things}|{self.background}'

    @property
    def split(self) -> str:
        """'test' (8%), 'val' (4%) or 'train', from a stable hash of the scene."""
        share = zlib.crc32(self.key.encode()) % 100
        return 'test' if share < 8 else 'val' if share < 12 else 'train'

    def to_dict(self) -> dict:
        return {'kind': self.kind, 'arrangement': self.arrangement, 'background': self.background, 'count': self.count,
                'things': [[t.shape, t.colour, t.fill, t.size] for t in self.things]}

    @classmethod
    def from_dict(cls, state: dict) -> 'Scene':
        return cls(state['kind'], state['arrangement'], tuple(Thing(*t) for t in state['things']),
                   state['background'], state['count'])


def sample_scene(rng: random.Random, kinds: dict[str, float] = KINDS) -> Scene:
    """Draw a scene, its kind by the given shares; no two things of one scene share shape and colour."""
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    arrangement = rng.choice(ARRANGEMENTS[kind])
    things: list[Thing] = []
    while len(things) < {'pair': 2, 'triple': 3}.get(kind, 1):
        fill = rng.choice(('solid', 'solid', 'striped', 'outlined'))
        sized = kind in ('single', 'pair') and arrangement != 'inside'
        thing = Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), fill, rng.choice(tuple(SIZES)) if sized else None)
        if arrangement == 'inside':  # solid, and of two colours, so that the inner one stands out
            thing = Thing(thing.shape, thing.colour)
            if things and thing.colour == things[0].colour:
                continue
        if all((thing.shape, thing.colour) != (t.shape, t.colour) for t in things):
            things.append(thing)
    background = rng.choice(tuple(BACKGROUNDS))
    return Scene(kind, arrangement, tuple(things), background, rng.choice((2, 3)) if kind == 'group' else 1)


def sample_split(split: str, count: int, seed: int, distinct: bool, kinds: dict[str, float] = KINDS) -> list[Scene]:
    """`count` scenes of a split; `distinct` ones occur once."""
    rng, scenes, seen = random.Random(seed), [], set()
    while len(scenes) < count:
        scene = sample_scene(rng, kinds)
        if scene.split == split and not (distinct and scene.key in seen):
            seen.add(scene.key)
            scenes.append(scene)
    return scenes


# ---------------------------------------------------------------- drawing

def outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """The polygon of a shape of radius r around (x, y)."""
    if shape == 'square':
        points = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    elif shape == 'triangle':
        points = [(0, -1), (1, 0.8), (-1, 0.8)]
    elif shape == 'cross':
        w = 0.34
        points = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w),
                  (-w, -w)]
    elif shape == 'star':
        points = [((0.44, 1)[i % 2 == 0] * math.sin(i * math.pi / 5),
                   -(0.44, 1)[i % 2 == 0] * math.cos(i * math.pi / 5)) for i in range(10)]
    elif shape == 'heart':
        turns = [i * math.tau / 40 for i in range(40)]
        points = [(0.06 * 16 * math.sin(t) ** 3, -0.06 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)
                                                         - math.cos(4 * t)) - 0.1) for t in turns]
    else:
        points = [(math.sin(i * math.tau / 40), -math.cos(i * math.tau / 40)) for i in range(40)]
    return [(x + r * px, y + r * py) for px, py in points]


def jittered(colour: tuple[int, int, int], rng: random.Random, amount: int = 12) -> tuple[int, int, int]:
    return tuple(max(0, min(255, c + rng.randint(-amount, amount))) for c in colour)


def draw_thing(image: Image.Image, thing: Thing, x: float, y: float, r: float, rng: random.Random) -> None:
    x, y, r = x * SUPERSAMPLING, y * SUPERSAMPLING, r * SUPERSAMPLING
    mask = Image.new('L', image.size, 0)
    pen = ImageDraw.Draw(mask)
    pen.polygon(outline(thing.shape, x, y, r), fill=255)
    if thing.fill == 'striped':
        stripes = Image.new('L', image.size, 255)
        gaps, period = ImageDraw.Draw(stripes), r / 1.8
        for i in range(4):  # a tint remains between the stripes, so that the shape can be told at 64 pixels
            top = y - r + (i + 0.5) * period
            gaps.rectangle([x - 1.1 * r, top, x + 1.1 * r, top + 0.45 * period], fill=90)
        mask = ImageChops.multiply(mask, stripes)
    elif thing.fill == 'outlined':
        pen.polygon(outline(thing.shape, x, y + (0.13 * r if thing.shape == 'triangle' else 0), 0.58 * r), fill=0)
    image.paste(jittered(COLOURS[thing.colour], rng), (0, 0), mask)


def places(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    """Centre and radius of every thing to draw, jittered, in drawing order."""
    def jitter(amount: float) -> float:
        return rng.uniform(-amount, amount)
    radii = [SIZES[t.size] if t.size else 16.5 for t in scene.things]
    if scene.kind == 'single':
        x, y = PLACES[scene.arrangement]
        return [(x + jitter(6), y + jitter(6), radii[0] * rng.uniform(0.95, 1.08))]
    if scene.arrangement == 'inside':
        x, y = 64 + jitter(10), 64 + jitter(10)
        return [(x, y, 16.0), (x, y, 46.0)]
    count = scene.count if scene.kind == 'group' else len(scene.things)
    across, drift = jitter(8), 5 if count == 2 else 3
    out = []
    for i in range(count):
        r = radii[0 if scene.kind == 'group' else i]
        along = (34, 94)[i] if count == 2 else 24 + 40 * i
        u, v = along + jitter(drift), 64 + across + jitter(drift)
        x, y = (u, v) if scene.arrangement in ('row', 'left') else (v, u)
        out.append((x, y, r * rng.uniform(0.95, 1.06)))
    return out


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene -> RGB image of 128 x 128; positions, sizes and colours vary with `rng`."""
    side = SIDE * SUPERSAMPLING
    image = Image.new('RGB', (side, side), jittered(BACKGROUNDS[scene.background], rng, 6))
    spots = places(scene, rng)
    things = scene.things * scene.count if scene.kind == 'group' else scene.things
    drawing = list(zip(things, spots, strict=True))
    for thing, (x, y, r) in reversed(drawing):  # the outer thing before the inner one
        draw_thing(image, thing, x, y, r, rng)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)

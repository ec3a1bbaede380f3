"""The drawn world: coloured shapes on a 3 x 3 grid, 48 x 48 pixels, everything decided by a seed."""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 140, 60),
    "blue": (40, 80, 200),
    "yellow": (240, 200, 30),
    "purple": (140, 60, 170),
    "white": (255, 255, 255),
}
SHAPES = ("circle", "square", "triangle", "cross")
OBJECTS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
GRID = 3
CELL = 16
SIZE = GRID * CELL
# Drawn larger and scaled down, so that edges are smooth.
_ZOOM = 4


@dataclass(frozen=True)
class Placed:
    """One object of a scene."""

    name: str  # colour and shape, one of `OBJECTS`
    cell: int  # 0 to 8 in reading order
    x: float  # centre, in pixels from the upper left corner
    y: float
    radius: float  # half its width


@dataclass(frozen=True)
class Scene:
    """What one image shows: two to five different objects on a grey ground, in reading order."""

    objects: tuple[Placed, ...]
    ground: int

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the objects in reading order; none twice."""
        return tuple(placed.name for placed in self.objects)


def make_scene(rng: random.Random) -> Scene:
    """Draw lots for a scene of two to five different objects, each somewhere within its own cell."""
    names = rng.sample(OBJECTS, rng.randint(2, 5))
    cells = sorted(rng.sample(range(GRID * GRID), len(names)))
    placed = []
    for name, cell in zip(names, cells, strict=True):
        row, column = divmod(cell, GRID)
        x = (column + 0.5) * CELL + rng.uniform(-1.5, 1.5)
        y = (row + 0.5) * CELL + rng.uniform(-1.5, 1.5)
        placed.append(Placed(name, cell, x, y, rng.uniform(4.5, 6.0)))
    return Scene(tuple(placed), rng.randint(70, 110))


def draw(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of `SIZE` x `SIZE` pixels."""
    image = Image.new("RGB", (SIZE * _ZOOM, SIZE * _ZOOM), (scene.ground,) * 3)
    pen = ImageDraw.Draw(image)
    for placed in scene.objects:
        colour, shape = placed.name.split()
        x, y, r = placed.x * _ZOOM, placed.y * _ZOOM, placed.radius * _ZOOM
        fill = COLOURS[colour]
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif shape == "square":
            pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=fill)
        elif shape == "triangle":
            pen.polygon(((x, y - r), (x + r, y + 0.9 * r), (x - r, y + 0.9 * r)), fill=fill)
        else:
            pen.rectangle((x - r, y - 0.33 * r, x + r, y + 0.33 * r), fill=fill)
            pen.rectangle((x - 0.33 * r, y - r, x + 0.33 * r, y + r), fill=fill)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)

"""Small pictures in the units of what they show: lines, discs and words, smooth, as arrays of pixels.

For frames of moving pictures, of which there are hundreds: Pillow draws one in a few milliseconds, and needs no screen.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from jaxrl_dist.records.plotting import INK

# Pixels that a canvas has for one of the picture: they are averaged in the end, which makes edges smooth.
DENSE = 3
WIDTH = 320

Point = Sequence[float]


class Canvas:
    """A picture whose left and right are `x`, whose bottom and top are `y` (larger one first: y goes down).

    width: pixels; height: pixels, by default such that both units are equally long. Widths of lines, sizes of letters
    and what is called pixels here are of a picture 320 pixels wide; `image` has `DENSE` times as many.
    """

    def __init__(
        self,
        x: Point,
        y: Point,
        *,
        width: float = WIDTH,
        height: float | None = None,
        background: str = "white",
    ):
        self.x, self.y = x, y
        height = width * abs((y[1] - y[0]) / (x[1] - x[0])) if height is None else height
        self.width, self.height = width, height
        size = max(1, round(DENSE * width)), max(1, round(DENSE * height))
        self.image = Image.new("RGB", size, background)
        self._draw = ImageDraw.Draw(self.image, "RGBA")
        self.scale = np.array([DENSE * width / (x[1] - x[0]), DENSE * height / (y[1] - y[0])])

    def array(self) -> np.ndarray:
        """The picture, uint8 `[height, width, 3]`, dense."""
        return np.asarray(self.image)

    def rectangle(self, x: Point, y: Point, colour: str, *, outline: str | None = None, round_by: float = 0) -> None:
        """From x[0] to x[1] and from y[0] to y[1], with corners rounded by so many pixels."""
        (left, top), (right, bottom) = np.sort(self._pixels(np.stack([x, y], -1)), axis=0)
        box = (left, top, max(left, right - 1), max(top, bottom - 1))
        self._draw.rounded_rectangle(box, DENSE * round_by, colour, outline, DENSE if outline else 0)

    def disc(
        self, at: Point, radius: float, colour: str | None, *, outline: str | None = None, line: float = 1
    ) -> None:
        """radius in units of x; the outline, `line` pixels wide, lies within it."""
        x, y = self._pixels(at)
        r = radius * abs(self.scale[0])
        self._draw.ellipse((x - r, y - r, x + r, y + r), colour, outline, round(DENSE * line) if outline else 0)

    def line(self, points: Iterable[Point], colour: str, width: float = 1, *, ends: bool = True) -> None:
        """Through the points, `width` pixels wide, with round joints, and with round `ends`."""
        places = [tuple(place) for place in self._pixels(list(points))]
        wide = max(1, round(DENSE * width))
        self._draw.line(places, colour, wide, "curve")
        if ends and wide > 2:
            for x, y in (places[0], places[-1]):
                self._draw.ellipse((x - wide / 2, y - wide / 2, x + wide / 2, y + wide / 2), colour)

    def dashes(self, start: Point, end: Point, colour: str, width: float = 1, *, every: float = 7) -> None:
        """A straight line of dashes, one in so many pixels."""
        first, last = self._pixels([start, end])
        count = max(1, round(math.dist(first, last) / (DENSE * every)))
        for part in range(count):
            ends = [tuple(first + (last - first) * (part + share) / count) for share in (0, 0.5)]
            self._draw.line(ends, colour, max(1, round(DENSE * width)))

    def polygon(self, points: Iterable[Point], colour: str, outline: str | None = None) -> None:
        places = [tuple(place) for place in self._pixels(list(points))]
        if len(places) > 1:
            self._draw.polygon(places, colour, outline, DENSE if outline else 1)

    def arrow(self, start: Point, end: Point, colour: str, width: float = 1.5, *, head: float = 6) -> None:
        """A line with a head of so many pixels at its end."""
        first, last = self._pixels([start, end])
        length = math.dist(first, last)
        if length < 1e-6:
            return
        along, size = (last - first) / length, min(DENSE * head, length)
        across, neck = np.array([-along[1], along[0]]), last - size * along
        self._draw.line([tuple(first), tuple(neck)], colour, max(1, round(DENSE * width)))
        self._draw.polygon([tuple(last), tuple(neck + 0.5 * size * across), tuple(neck - 0.5 * size * across)], colour)

    def arc(self, at: Point, radius: float, degrees: Point, colour: str, width: float = 2, *, head: float = 6) -> None:
        """From one angle to another, counted as in mathematics, with a head at the end; radius in units of x."""
        angles = np.radians(np.linspace(*degrees, 24))
        points = np.asarray(at) + radius * np.stack([np.cos(angles), np.sin(angles)], -1)
        self.line(points[:-3], colour, width, ends=False)
        self.arrow(points[-5], points[-1], colour, width, head=head)

    def text(
        self, at: Point, words: str, colour: str = INK, *, size: float = 10, anchor: str = "mm", bold: bool = False
    ) -> None:
        """`size` in pixels; anchor: which point of the words stands there, as Pillow names it."""
        self._draw.text(tuple(self._pixels(at)), words, colour, font(DENSE * size, bold), anchor)

    def _pixels(self, points: Sequence) -> np.ndarray:
        corner = np.array([self.x[0], self.y[1]])
        return (np.asarray(points, float) - corner) * self.scale * (1, -1)


class Board(Canvas):
    """A canvas of square cells: the middle of the one in row r and column c, from the top left, is (c, r)."""

    def __init__(self, rows: int, columns: int, *, background: str = "white", tallest: float = 220):
        width = min(WIDTH, tallest * columns / rows)
        super().__init__((-0.5, columns - 0.5), (rows - 0.5, -0.5), width=width, background=background)

    def cell(self, row: float, column: float, colour: str, *, gap: float = 0.05, round_by: float = 2) -> None:
        """One filled cell, with a gap to its neighbours in parts of its width."""
        half = 0.5 - gap
        self.rectangle((column - half, column + half), (row - half, row + half), colour, round_by=round_by)


def mix(colour: str, other: str, part: float) -> str:
    """`part` of one colour, the rest of the other."""
    one, two = (np.array(ImageColor.getrgb(name)[:3]) for name in (colour, other))
    return "#" + "".join(f"{round(value):02X}" for value in part * one + (1 - part) * two)


@functools.cache
def font(size: float, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The letters of our figures, which matplotlib brings along."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def length(words: str, size: float, bold: bool = False) -> float:
    """How many pixels wide words are."""
    return font(DENSE * size, bold).getlength(words) / DENSE


def fitted(image: np.ndarray, width: int, height: int) -> Image.Image:
    """The picture as large as it can be in `width` x `height` pixels; small ones keep their square pixels."""
    picture = Image.fromarray(image)
    times = min(width / picture.width, height / picture.height)
    if times >= 2:
        times = math.floor(times)
        return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    size = max(1, round(picture.width * times)), max(1, round(picture.height * times))
    return picture.resize(size, Image.Resampling.BOX if times < 1 else Image.Resampling.BICUBIC)

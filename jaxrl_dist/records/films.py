"""Moving pictures of episodes, with the law of the return that was predicted at each step under them.

A `Film` is what was recorded, in arrays of numpy; a `Stage` draws its pictures one by one, all of one size; `gif`,
`page` and `mp4` make files of them. Colours are those of our figures: what was learned is red, what followed blue.
"""

import base64
import html
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageColor

from jaxrl_dist.distributional.law import Law
from jaxrl_dist.records.canvas import DENSE, WIDTH, Canvas, fitted, length, mix
from jaxrl_dist.records.plotting import COLOURS, FAINT, GRID, INK

IN_A_ROW = 4
"""seeds side by side"""
BAND = (0.1, 0.9)
"""the central interval of laws that is shown"""
LEARNED, FOLLOWED = COLOURS[1], COLOURS[0]
BELIEVED = mix(LEARNED, "#FFFFFF", 0.3)


class Episode(NamedTuple):
    """One episode, arrays of numpy. T: its steps that are shown.

    states: what pictures are drawn of, leaves `[T + 1, ...]`, the last one where the episode ended, or `[T, ...]` where
    nobody knows that one. reward: `[T]`, as the environment pays it. predicted: what the critic says of the return from
    each step on, fields `[T, atoms]`, or None. followed: `[T]`, the discounted return that followed, of what the critic
    learns from; seen: `[T]`, whether it is known but for less than 1 %. end: how it ended, in a word or two.
    """

    states: Any
    reward: np.ndarray
    predicted: Law | None
    followed: np.ndarray
    seen: np.ndarray
    end: str

    @property
    def pictures(self) -> int:
        """Of how many moments there is a picture."""
        return len(jax.tree.leaves(self.states)[0])


class Film(NamedTuple):
    """What is shown: `scenes[i][j]`, one after the other, is what `names[j]` did in the i-th of them."""

    title: str
    note: str
    names: tuple[str, ...]
    scenes: Sequence[Sequence[Episode]]
    labels: tuple[str, ...]
    """of each scene"""
    picture: Callable[[Any], np.ndarray]
    """of a state: uint8 `[height, width, 3]`"""
    learns_mean: bool = False
    """predictions are one mean per critic, and no law"""
    every: int = 1
    """steps from one picture to the next"""
    fps: float = 0.0
    """pictures per second; 0: 30, fewer for scenes that would be over in less than six seconds"""
    scale: float = 1.0


# -- drawing ----------------------------------------------------------------------------------------------------------

MARGIN, TITLE, HEADING, PANEL, LEGEND = 8, 34, 18, 122, 16
TALLEST = 240
# Of the panel: where time lies and where the present law, and between what heights.
TIME, NOW, HEIGHTS = (40, 226), (240, WIDTH - 6), (16, 102)


class Moment(NamedTuple):
    """What one picture of a film shows: a scene, and a step of it (the number of steps: where it ended)."""

    scene: int
    step: int
    last: bool


class Stage:
    """Draws the pictures of a film, which all have one size."""

    def __init__(self, film: Film):
        self.film, self.scale = film, film.scale
        self.columns = min(len(film.names), IN_A_ROW)
        self.rows = -(-len(film.names) // self.columns)
        episodes = [episode for scene in film.scenes for episode in scene]
        self.has_law = episodes[0].predicted is not None
        first = self._drawn(episodes[0], 0)
        times = min(WIDTH / first.shape[1], TALLEST / first.shape[0])
        natural = first.shape[0] / DENSE if times <= 1 / DENSE + 1e-6 or first.shape[1] > WIDTH else None
        self.picture_height = max(40, round(min(natural or TALLEST, first.shape[0] * times)))
        self.cell = WIDTH + 2 * MARGIN, HEADING + self.picture_height + (PANEL if self.has_law else 6)
        self.size = (
            self._pixels(self.columns * self.cell[0]),
            self._pixels(TITLE + self.rows * self.cell[1] + (LEGEND if self.has_law else 2)),
        )
        if self.has_law:
            self.range = _range(episodes)
            self.ticks = _ticks(*self.range)
            self.bands = [[_band(episode, film.learns_mean) for episode in scene] for scene in film.scenes]
        self._backdrop = self._draw_backdrop()

    def moments(self) -> list[Moment]:
        """In their order: of every scene the steps until its last seed has ended."""
        found = []
        for number, scene in enumerate(self.film.scenes):
            longest = max(episode.pictures for episode in scene)
            steps = list(range(0, longest, self.film.every))
            steps += [longest - 1] if steps[-1] != longest - 1 else []
            found += [Moment(number, step, step == longest - 1) for step in steps]
        return found

    def draw(self, moment: Moment) -> Image.Image:
        picture = self._backdrop.copy()
        for place, name in enumerate(self.film.names):
            episode = self.film.scenes[moment.scene][place]
            corner = place % self.columns * self.cell[0] + MARGIN, TITLE + place // self.columns * self.cell[1]
            step = min(moment.step, episode.pictures - 1)
            self._paste(picture, self._heading(name, episode, moment.scene, step), corner)
            seen = fitted(self._drawn(episode, step), self._pixels(WIDTH), self._pixels(self.picture_height))
            left = self._pixels(corner[0]) + (self._pixels(WIDTH) - seen.width) // 2
            top = self._pixels(corner[1] + HEADING) + (self._pixels(self.picture_height) - seen.height) // 2
            picture.paste(seen, (left, top))
            if self.has_law:
                panel = self._panel(episode, self.bands[moment.scene][place], step)
                self._paste(picture, panel, (corner[0], corner[1] + HEADING + self.picture_height))
        return picture

    def _pixels(self, length: float) -> int:
        return 2 * round(self.scale * length / 2)  # even, as films want it

    def _paste(self, picture: Image.Image, canvas: Canvas, corner: tuple[float, float]) -> None:
        size = self._pixels(canvas.width), self._pixels(canvas.height)
        picture.paste(canvas.image.resize(size, Image.Resampling.BOX), tuple(self._pixels(x) for x in corner))

    def _drawn(self, episode: Episode, step: int) -> np.ndarray:
        return self.film.picture(jax.tree.map(lambda x: x[step], episode.states))

    def _draw_backdrop(self) -> Image.Image:
        """Title and legend, which stay."""
        picture = Image.new("RGB", self.size, "white")
        width = self.columns * self.cell[0]
        canvas = _sheet(width, TITLE)
        size = min(13, 13 * (width - 2 * MARGIN) / length(self.film.title, 13, True))
        canvas.text((MARGIN, 12), self.film.title, size=size, anchor="lm", bold=True)
        canvas.text((MARGIN, 27), self.film.note, FAINT, size=9, anchor="lm")
        self._paste(picture, canvas, (0, 0))
        if self.has_law:
            canvas = _sheet(width, LEGEND)
            words = "learned mean" if self.film.learns_mean else "learned law: 10 \N{EN DASH} 90 %, mean"
            if not self.film.learns_mean:
                canvas.rectangle((MARGIN, MARGIN + 14), (2, 10), BELIEVED)
            canvas.line([(MARGIN, 6), (MARGIN + 14, 6)], LEARNED, 1.5)
            canvas.text((MARGIN + 19, 6), words, size=9, anchor="lm")
            left = 178 if not self.film.learns_mean else 110
            canvas.line([(left, 6), (left + 14, 6)], FOLLOWED, 1.5)
            canvas.disc((left + 7, 6), 2.6, FOLLOWED)
            canvas.text((left + 19, 6), "return that followed", size=9, anchor="lm")
            self._paste(picture, canvas, (0, TITLE + self.rows * self.cell[1]))
        return picture

    def _heading(self, name: str, episode: Episode, scene: int, step: int) -> Canvas:
        canvas = _sheet(WIDTH, HEADING)
        canvas.text((0, 9), name, size=10, anchor="lm", bold=True)
        canvas.text((8 + length(name, 10, True), 9), self.film.labels[scene], FAINT, size=9, anchor="lm")
        earned = f"step {step}   return {_short(episode.reward[:step].sum())}"
        if step == len(episode.reward):
            earned = f"{episode.end}   {earned}"
        canvas.text((WIDTH, 9), earned, size=9, anchor="rm")
        return canvas

    def _panel(self, episode: Episode, band: np.ndarray, step: int) -> Canvas:
        """Predicted and observed returns up to this step, and to their right the law of this very step."""
        canvas, (low, high), (top, bottom) = _sheet(WIDTH, PANEL), self.range, HEIGHTS
        steps = len(episode.reward)

        def y(value):
            return bottom - (np.clip(np.nan_to_num(value, nan=low), low, high) - low) / (high - low) * (bottom - top)

        def x(time):
            return TIME[0] + (TIME[1] - TIME[0]) * np.asarray(time) / max(steps - 1, 1)

        canvas.text((TIME[0], 6), "return from here on", FAINT, size=8, anchor="lm")
        canvas.text((NOW[0], 6), "believed now", FAINT, size=8, anchor="lm")
        for tick in self.ticks:
            canvas.line([(TIME[0], y(tick)), (TIME[1], y(tick))], GRID, 0.7, ends=False)
            canvas.line([(NOW[0], y(tick)), (NOW[1], y(tick))], GRID, 0.7, ends=False)
            canvas.text((TIME[0] - 4, y(tick)), _short(tick), size=8, anchor="rm")
        canvas.line([(TIME[0], bottom), (TIME[1], bottom)], FAINT, 0.8, ends=False)
        canvas.line([(NOW[0], top), (NOW[0], bottom)], FAINT, 0.8, ends=False)
        for time, anchor in ((0, "lt"), (steps - 1, "rt")) if steps > 1 else ((0, "lt"),):
            canvas.text((x(time), bottom + 4), str(time), size=8, anchor=anchor)
        canvas.text((np.mean(TIME), bottom + 4), "step", FAINT, size=8, anchor="mt")
        now = min(step, steps - 1)
        gone = np.arange(now + 1)
        below, mean, above = band[: now + 1].T
        if not self.film.learns_mean and now:
            edges = [*zip(x(gone), y(below), strict=True), *zip(x(gone)[::-1], y(above)[::-1], strict=True)]
            canvas.polygon(edges, BELIEVED)
        if now:
            canvas.line(zip(x(gone), y(episode.followed[: now + 1]), strict=True), FOLLOWED, 1.5)
            canvas.line(zip(x(gone), y(mean), strict=True), LEARNED, 1.5)
        if step < steps:
            self._present(canvas, episode, step, y)
            canvas.disc((x(step), y(mean[-1])), 2.4, LEARNED)
        else:
            canvas.text((np.mean(NOW), (top + bottom) / 2), episode.end, FAINT, size=9)
        sure = episode.seen[now]
        places = [x(now)] + [NOW[1] - 5] * (step < steps)
        for place in places:
            mark = (place, y(episode.followed[now]))
            canvas.disc(mark, 2.8, FOLLOWED if sure else "white", outline=FOLLOWED, line=1.2)
        return canvas

    def _present(self, canvas: Canvas, episode: Episode, step: int, y: Callable) -> None:
        """The law of this step as a shape, whose width says how likely a return is, or the mean of each critic."""
        atoms, masses = (part[step] for part in episode.predicted)
        if not (np.isfinite(atoms).all() and np.isfinite(masses).all()):
            canvas.text((np.mean(NOW), np.mean(HEIGHTS)), "not finite", FAINT, size=9)
            return
        if self.film.learns_mean:
            for value in atoms:
                canvas.line([(NOW[0], y(value)), (NOW[1] - 12, y(value))], LEARNED, 2)
        else:
            edges, heights = shape_of(atoms, masses, *self.range)
            widths = NOW[0] + heights / heights.max() * (NOW[1] - NOW[0] - 14)
            outline = list(zip(widths, y(edges), strict=True))
            canvas.polygon([(NOW[0], y(edges[0])), *outline, (NOW[0], y(edges[-1]))], BELIEVED)
            above = np.flatnonzero(heights > 0.01 * heights.max())
            canvas.line(outline[above[0] : above[-1] + 1], LEARNED, 1.2)
        value = y(episode.followed[step])
        canvas.dashes((NOW[0], value), (NOW[1] - 8, value), FOLLOWED, 1.2, every=5)


def _sheet(width: float, height: float) -> Canvas:
    """A canvas in pixels, from the top left."""
    return Canvas((0, width), (height, 0), width=width, height=height)


def shape_of(atoms: np.ndarray, masses: np.ndarray, low: float, high: float, bins: int = 60) -> tuple:
    """A law `[atoms]` over returns from low to high: places `[bins]` and smoothed probabilities there.

    Smoothed by a Gaussian of one bin, which is a sixtieth of the range: no detail is shown that is finer.
    """
    width = (high - low) / bins
    centres = low + width * (np.arange(bins) + 0.5)
    kernel = np.exp(-0.5 * ((centres[:, None] - np.clip(atoms, low, high)) / width) ** 2)
    return centres, np.maximum(kernel @ masses, 1e-12)


def _band(episode: Episode, learns_mean: bool) -> np.ndarray:
    """Lower end, mean and upper end of every prediction, `[T, 3]`."""
    atoms, masses = episode.predicted
    mean = (atoms * masses).sum(-1)
    if learns_mean:
        return np.stack([atoms.min(-1), mean, atoms.max(-1)], -1)
    low, high = quantiles(episode.predicted, BAND).T
    return np.stack([low, mean, high], -1)


def quantiles(law: Law, fractions: Sequence[float]) -> np.ndarray:
    """Lower quantiles of laws `[T, atoms]` of numpy, `[T, fractions]`."""
    order = np.argsort(law.atoms, -1)
    atoms, masses = (np.take_along_axis(part, order, -1) for part in law)
    cumulated = np.cumsum(masses, -1)
    found = [(cumulated < fraction - 1e-6).sum(-1).clip(max=atoms.shape[-1] - 1) for fraction in fractions]
    return np.stack([np.take_along_axis(atoms, index[:, None], -1)[:, 0] for index in found], -1)


def _range(episodes: Sequence[Episode]) -> tuple[float, float]:
    """What the axis of returns has to show of all of them: laws from their 2 % to their 98 % quantile."""
    values = [episode.followed for episode in episodes]
    values += [quantiles(episode.predicted, (0.02, 0.98)).ravel() for episode in episodes]
    values = np.concatenate(values)
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.5 * max(1.0, abs(high))
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    return [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]


def _short(value: float) -> str:
    return f"{value + 0.0:.4g}".replace("-", "\N{MINUS SIGN}")


# -- files -------------------------------------------------------------------------------------------------------------


def seconds(stage: Stage) -> list[float]:
    """How long each picture stays; the last one of a scene a little longer."""
    moments = stage.moments()
    per_scene = len(moments) / len(stage.film.scenes)
    fps = stage.film.fps or min(30.0, max(1.0, per_scene / 6))
    return [1 / fps + moment.last * 1.2 for moment in moments]


def _in_colours(stage: Stage, most: int) -> Iterator[Image.Image]:
    """The pictures, with one table of `most` colours: those of our figures, and what some of the pictures need."""
    moments = stage.moments()
    some = np.unique(np.linspace(0, len(moments) - 1, 10).astype(int))
    together = Image.fromarray(np.concatenate([np.asarray(stage.draw(moments[index])) for index in some]))
    ours = np.array([ImageColor.getrgb(colour) for colour in ("#FFFFFF", INK, FAINT, GRID, *COLOURS, BELIEVED)])
    found = together.quantize(most - len(ours), Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).getpalette()
    found = np.array(found).reshape(-1, 3)
    # Of two that are nearly the same Pillow takes either.
    far = np.abs(found[:, None] - ours).max(-1).min(1) > 10
    colours = Image.new("P", (1, 1))
    colours.putpalette(np.concatenate([ours, found[far]])[:most].ravel().tolist())
    for moment in moments:
        yield stage.draw(moment).quantize(palette=colours, dither=Image.Dither.NONE)


def gif(stage: Stage) -> bytes:
    pictures = _in_colours(stage, 96)
    # The format counts in hundredths of a second, and viewers take a single one for ten.
    durations = [max(20, 10 * round(100 * second)) for second in seconds(stage)]
    found = io.BytesIO()
    next(pictures).save(found, "GIF", save_all=True, append_images=pictures, duration=durations, loop=0)
    return found.getvalue()


def mp4(stage: Stage) -> bytes:
    import imageio_ffmpeg

    moments, stays_for = stage.moments(), seconds(stage)
    fps = 1 / min(stays_for)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        writer = imageio_ffmpeg.write_frames(
            str(path), stage.size, fps=fps, macro_block_size=2, output_params=["-crf", "18"]
        )
        writer.send(None)
        for moment, stays in zip(moments, stays_for, strict=True):
            picture = np.asarray(stage.draw(moment)).tobytes()
            for _ in range(max(1, round(stays * fps))):
                writer.send(picture)
        writer.close()
        return path.read_bytes()


def page(stage: Stage) -> str:
    """A page of its own that plays the film, without a network: the pictures are in it."""
    pictures = []
    for picture in _in_colours(stage, 128):
        data = io.BytesIO()
        picture.save(data, "PNG", optimize=True)
        pictures.append(base64.b64encode(data.getvalue()).decode())
    milliseconds = [round(1000 * value) for value in seconds(stage)]
    return _PAGE.format(
        title=html.escape(stage.film.title), width=stage.size[0], height=stage.size[1],
        pictures=json.dumps(pictures), milliseconds=json.dumps(milliseconds), last=len(pictures) - 1,
    )  # fmt: skip


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0; padding: 12px; font: 14px system-ui, sans-serif; color: #1F2328; background: white; }}
main {{ max-width: {width}px; margin: auto; }}
img {{ width: 100%; height: auto; display: block; image-rendering: auto; }}
.controls {{ display: flex; gap: 8px; align-items: center; padding: 6px 8px; }}
button, select {{ font: inherit; padding: 4px 10px; border: 1px solid #D1D5DB; border-radius: 6px;
  background: #F9FAFB; }}
button {{ min-width: 72px; }}
input {{ flex: 1; min-width: 60px; accent-color: #0072B2; }}
</style></head><body><main>
<img id="picture" alt="{title}" width="{width}" height="{height}">
<div class="controls">
<button id="play">Pause</button>
<input id="time" type="range" min="0" max="{last}" value="0" aria-label="picture">
<select id="speed" aria-label="speed"><option value="0.25">1/4</option><option value="0.5">1/2</option>
<option value="1" selected>normal speed</option><option value="2">2 times</option><option value="4">4 times</option>
</select>
</div></main>
<script>
const pictures = {pictures}.map(data => {{
  const one = new Image(); one.src = "data:image/png;base64," + data; return one;
}});
const milliseconds = {milliseconds};
const picture = document.getElementById("picture"), time = document.getElementById("time");
const play = document.getElementById("play"), speed = document.getElementById("speed");
let now = 0, playing = true, timer = null;
function show(index) {{ now = index; picture.src = pictures[now].src; time.value = now; }}
function wait() {{
  clearTimeout(timer);
  const next = () => {{ show((now + 1) % pictures.length); wait(); }};
  if (playing) timer = setTimeout(next, milliseconds[now] / speed.value);
}}
function toggle(state) {{ playing = state; play.textContent = playing ? "Pause" : "Play"; wait(); }}
play.onclick = () => toggle(!playing);
time.oninput = () => {{ toggle(false); show(+time.value); }};
speed.onchange = wait;
document.addEventListener("keydown", event => {{
  if (event.target.tagName === "SELECT") return;
  if (event.key === " " && event.target.tagName !== "BUTTON") {{ event.preventDefault(); toggle(!playing); }}
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") {{
    event.preventDefault(); toggle(false);
    show(Math.min(pictures.length - 1, Math.max(0, now + (event.key === "ArrowRight" ? 1 : -1))));
  }}
}});
show(0); wait();
</script></body></html>
"""

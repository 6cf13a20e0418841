"""How a run says how far it is: a bar in a terminal or a notebook, one plain line per evaluation everywhere else."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from jaxrl_dist.records import statistics


class Progress:
    """Plain lines: for logs, pipes, SLURM's files and terminals that cannot move their cursor."""

    def __init__(self, console: Console, total: int, done: int, unit: str):
        self.console, self.total, self.first, self.unit = console, total, done, unit
        self.started = time.monotonic()

    def move(self, now: int, headline: str, rates: str) -> None:
        """After every chunk of training."""

    def evaluated(self, now: int, headline: str, rates: str) -> None:
        """After every evaluation."""
        parts = [f"{now:,}/{self.total:,} {self.unit}", headline, rates, self._left(now)]
        self.console.print("  ".join(part for part in parts if part), highlight=False, markup=False, soft_wrap=True)

    def _left(self, now: int) -> str:
        done = now - self.first
        if done <= 0 or now >= self.total:
            return ""
        seconds = (time.monotonic() - self.started) / done * (self.total - now)
        return f"{clock(seconds)} left"


class _TerminalBar(Progress):
    def __init__(self, console: Console, total: int, done: int, unit: str, bar: RichProgress):
        super().__init__(console, total, done, unit)
        self.bar = bar
        self.task = bar.add_task("", total=total, completed=done, rates="")

    def move(self, now: int, headline: str, rates: str) -> None:
        self.bar.update(self.task, completed=now, description=headline, rates=rates)

    evaluated = move


class _NotebookBar(Progress):
    """IPython's own bar and a line of text below it; rich's would need ipywidgets."""

    def __init__(self, console: Console, total: int, done: int, unit: str):
        from IPython.display import ProgressBar, display

        super().__init__(console, total, done, unit)
        self.bar = ProgressBar(total)
        self.bar.progress = done
        self.shown = display(self._picture(""), display_id=True)

    def _picture(self, text: str) -> Any:
        from IPython.display import HTML

        return HTML(f"{self.bar._repr_html_()}<br><code>{text}</code>")

    def move(self, now: int, headline: str, rates: str) -> None:
        self.bar._progress = now  # its property would draw a second bar
        parts = [f"{now:,}/{self.total:,} {self.unit}", headline, rates, self._left(now)]
        self.shown.update(self._picture("  ".join(part for part in parts if part)))

    evaluated = move


@contextlib.contextmanager
def shown(console: Console, total: int, done: int, unit: str) -> Iterator[Progress]:
    """The progress of a run from `done` to `total` of its unit, in the way that the console's place allows."""
    if console.is_jupyter:
        yield _NotebookBar(console, total, done, unit)
    elif console.is_terminal and not console.is_dumb_terminal:
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"), TimeRemainingColumn(),
        )  # fmt: skip
        with RichProgress(*columns, console=console) as bar:
            yield _TerminalBar(console, total, done, unit, bar)
    else:
        yield Progress(console, total, done, unit)


def clock(seconds: float) -> str:
    """Seconds as `h:mm:ss`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def headline(returns: np.ndarray) -> str:
    """Returns of an evaluation `[runs, episodes]` in a few words; runs whose returns are not finite are left out."""
    means = np.asarray(returns).mean(1)
    finite = means[np.isfinite(means)]
    if not len(finite):
        return "return not finite"
    text = f"return IQM {statistics.interquartile_mean(finite):.1f}"
    if len(finite) > 1:
        low, high = statistics.bootstrap_interval(finite)
        text += f" [{low:.1f}, {high:.1f}]"
    left_out = len(means) - len(finite)
    return text + (f" ({left_out} not finite)" if left_out else "")


def inside_program(total: int) -> Callable[[jax.Array, jax.Array, str], jax.Array]:
    """`tell(now, returns, unit) -> now`, which prints a plain line out of a compiled program.

    Under `vmap`, over any number of axes, it is one line for all runs. Use what it returns, or XLA drops the call.
    """
    console = Console(highlight=False)
    started = time.monotonic()

    def tell(now: jax.Array, returns: jax.Array, unit: str) -> jax.Array:
        def line(now, returns):
            now = np.asarray(now)
            runs = np.asarray(returns).reshape(-1, np.shape(returns)[-1])
            console.print(
                f"{int(now.max()):,}/{total:,} {unit}  {headline(runs)}  {clock(time.monotonic() - started)} since the "
                "start", markup=False, soft_wrap=True,
            )  # fmt: skip
            return now

        like = jax.ShapeDtypeStruct(now.shape, now.dtype)
        return jax.pure_callback(line, like, now, returns, vmap_method="broadcast_all")

    return tell

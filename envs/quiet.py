"""MuJoCo is imported here without the lines that it prints about packages that we do not need."""

import contextlib
import io
from collections.abc import Iterator


@contextlib.contextmanager
def without_warp_lines() -> Iterator[None]:
    """MuJoCo prints one line each for two optional packages that we do not need; everything else is printed still."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        harmless = ("Failed to import warp:", "Failed to import mujoco_warp:")
        for line in printed.getvalue().splitlines():
            if not line.startswith(harmless):
                print(line)

"""The tables of a run: CSV files that grow by whole lines, are sealed by checkpoints, and name their faults when read.

Rows are numbered as a spreadsheet shows them: the header is row 1.
"""

import csv
import hashlib
import io
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

TEXT_COLUMNS = ("diverged_metric",)
WHOLE_COLUMNS = ("env_steps", "configuration", "seed", "episode")  # what says which row it is: never empty
MAYBE_WHOLE_COLUMNS = ("iteration", "diverged_at")
CHECKSUM_BYTES = 8
SEALED_BLOCKS = 1024  # a seal has at most so many checksums, 16 letters each


class Table:
    """A CSV file that grows by whole lines.

    Its columns are those of the first rows; only the first append to a file that was there before may add some, which
    another version of this program did not write. A file whose header cannot be read is set aside.
    """

    def __init__(self, path: Path):
        self.path = path
        self._may_add_columns = True
        if path.exists():
            drop_incomplete_line(path)
            header = path.read_bytes().partition(b"\n")[0]
            if header and not {"env_steps", "seed"} <= set(_cells(header) or ()):
                os.replace(path, damaged := path.with_name(f"{path.name}.damaged"))
                warnings.warn(f"{path}: row 1 is no header, so the file is set aside as {damaged.name}", stacklevel=2)
        self._read()

    def _read(self) -> None:
        """Columns and checksums of what is on the disk."""
        lines = _lines(self.path.read_bytes()) if self.path.exists() else []
        self.columns = _cells(lines[0]) if lines else None
        self._bytes = sum(map(len, lines))
        self._checksums = _checksums(lines)

    def append(self, rows: Sequence[Mapping[str, Any]], first: Sequence[str]) -> None:
        """Write rows to the end; `first`: columns that stand before others in a new table."""
        if not rows:
            return
        for row in rows:
            for column in ("env_steps", "seed"):
                if row.get(column) is None:
                    raise ValueError(f"{self.path.name}: a row without {column!r}, which every row needs: {dict(row)}")
        given = dict.fromkeys(column for row in rows for column in row)  # a set that keeps the order
        columns = self.columns or [column for column in dict.fromkeys([*first, *given]) if column in given]
        unseen = [column for column in given if column not in columns]
        if unseen and not self._may_add_columns:
            raise ValueError(f"{self.path.name}: column {unseen[0]!r} was not in the first rows, which had {columns}")
        columns = columns + unseen
        cells = [[_as_text(column, row.get(column)) for column in columns] for row in rows]
        lines = _written(cells if self.columns else [columns, *cells])
        if self.columns and unseen:
            before = _lines(self.path.read_bytes())[1:]
            wider = (line[:-1] + b"," * len(unseen) + b"\n" for line in before)
            replace(self.path, b"".join([*_written([columns]), *wider]))
            self._read()
        with open(self.path, "ab") as file:
            file.write(b"".join(lines))
        self.columns, self._may_add_columns = columns, False
        self._bytes += sum(map(len, lines))
        self._checksums += _checksums(lines)

    def seal(self) -> dict[str, Any] | None:
        """What `check` needs to find any later change of the rows written so far; None before the first.

        Bytes, rows, and a checksum for every block of rows: of one row each in small tables, so that a change is found
        to the row, and of more in larger ones. The rows are on the disk when this returns.
        """
        if self.columns is None:
            return None
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        lines = len(self._checksums) // CHECKSUM_BYTES
        lines_per_block = 2 ** math.ceil(math.log2(max(1, lines / SEALED_BLOCKS)))
        blocks = _blocks(self._checksums, lines_per_block)
        return {"bytes": self._bytes, "rows": lines, "rows_per_block": lines_per_block, "blake2b": "".join(blocks)}

    def cut(self, iteration: int, env_steps: int, seal: Mapping[str, Any] | None = None) -> None:
        """Drop what was written after a seal that `check` found intact, or, without one, rows beyond an iteration.

        env_steps: those of the iteration, for rows without one. Without a seal, rows that cannot be read are dropped
        too, with a warning, and the file as it was stays beside the table.
        """
        if seal:
            os.truncate(self.path, seal["bytes"])
        elif self.columns is not None:
            header, *lines = _lines(self.path.read_bytes())
            kept, seen, unreadable = [header], set(), 0
            for line in lines:
                row = self._numbers(line)
                place = row and tuple(row.get(column) for column in ("iteration", *WHOLE_COLUMNS))
                if row is None or place in seen:
                    unreadable += 1
                    continue
                seen.add(place)
                has_iteration = row.get("iteration") is not None
                if row["iteration"] <= iteration if has_iteration else row["env_steps"] <= env_steps:
                    kept.append(line)
            if unreadable:
                shutil.copy(self.path, damaged := self.path.with_name(f"{self.path.name}.damaged"))
                warnings.warn(
                    f"{self.path}: dropped {_rows(unreadable)} that cannot be read; {damaged.name} still has them",
                    stacklevel=3,
                )
            replace(self.path, b"".join(kept))
        self._read()

    def _numbers(self, line: bytes) -> dict[str, float | None] | None:
        """The cells of a line, empty ones as None; None where one is not what its column holds."""
        cells = _cells(line)
        if cells is None or len(cells) != len(self.columns):
            return None
        row = {column: cell for column, cell in zip(self.columns, cells, strict=True) if column not in TEXT_COLUMNS}
        try:
            row = {column: float(cell) if cell else None for column, cell in row.items()}
        except ValueError:
            return None
        whole = [row[column] for column in WHOLE_COLUMNS if column in row]
        whole += [row[column] for column in MAYBE_WHOLE_COLUMNS if row.get(column) is not None]
        return row if all(value is not None and value.is_integer() for value in whole) else None


def check(path: Path, seal: Mapping[str, Any]) -> None:
    """Compare a table with its seal; ValueError names the first row that is not as it was written, and what is wrong.

    Rows after the sealed ones may be there.
    """
    count, per_block = seal["rows"], seal["rows_per_block"]
    written = f"{count} rows (with the header) were written"
    if not path.is_file():
        raise ValueError(f"{path} does not exist, but {written}")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path} is empty, but {written}")
    there = _lines(data)
    lines = there[:count]
    found, expected = _blocks(_checksums(lines), per_block), _split(seal["blake2b"], 2 * CHECKSUM_BYTES)
    same = [a == b for a, b in zip(found, expected, strict=False)]
    if all(same) and len(same) == len(expected):
        return
    start = same.index(False) * per_block if False in same else len(lines)
    end = min(start + per_block, len(lines))
    missing = f"; {_rows(count - len(lines))} missing" if len(lines) < count else ""
    columns = _cells(lines[0]) if lines else None
    for number, line in enumerate(lines[start:end], start + 1):
        cells = _cells(line)
        if cells is None:
            raise ValueError(f"{path} row {number} is not UTF-8{missing}")
        if start > 0 and len(cells) != len(columns or ()):
            raise ValueError(f"{path} row {number} has {len(cells)} cells, but {len(columns or ())} columns{missing}")
    if end == len(lines) < count and (start == end or per_block > 1):
        if data.endswith(b"\n"):
            raise ValueError(f"{path} ends at row {len(lines)}, but {written}")
        raise ValueError(f"{path} row {len(lines) + 1} is cut off, and {written}")
    where = f"row {start + 1} is" if end - start == 1 else f"one of the rows {start + 1} to {end} is"
    raise ValueError(f"{path}: {where} not as it was written{missing}")


def read(path: Path, needs: Sequence[str] = ("env_steps", "seed")) -> pd.DataFrame:
    """A table with its numbers as numbers, empty cells as NaN; `needs`: columns that must be there.

    An incomplete last line (a killed run) is left out with a warning. Raises ValueError, naming path and row, where the
    file is empty, has no rows, is not UTF-8 or ragged, lacks a column, has text in place of a number, or a row twice.
    """
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        warnings.warn(_incomplete(path, data[end:]), stacklevel=3)
        data = data[:end]
    if not data:
        raise ValueError(f"{path} is empty: the run was stopped before its first record")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} row {row}: not UTF-8") from error
    columns = _checked_columns(path, text, needs)
    frame = pd.read_csv(
        io.StringIO(text), dtype=dict.fromkeys(TEXT_COLUMNS, str), keep_default_na=False, na_values=["", "nan"],
        low_memory=False,
    )  # fmt: skip
    if frame.empty:
        raise ValueError(f"{path} has no rows after its header: the run was stopped before its first record")
    for column in columns:
        if column not in TEXT_COLUMNS:
            frame[column] = _numeric(path, frame[column])
    if "diverged_at" in frame:
        nowhere = frame.diverged_at.notna() & frame.get("iteration", pd.Series(np.nan, frame.index)).isna()
        if nowhere.any():
            raise ValueError(f"{path} row {nowhere.argmax() + 2}: there is a diverged_at, but no iteration")
    places = [column for column in ("iteration", *WHOLE_COLUMNS) if column in frame]
    twice = frame.duplicated(places)
    if twice.any():
        row = frame[twice].iloc[0]
        about = ", ".join(f"{column} {row[column]:.0f}" for column in places)
        raise ValueError(f"{path} row {twice.argmax() + 2}: there is another row about {about}")
    return frame


def drop_incomplete_line(path: Path) -> None:
    """Cut a file after its last line end: every line is written with its end, so a kill cut off what follows."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
        warnings.warn(_incomplete(path, data[end:]), stacklevel=3)


def replace(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


# -- small things -----------------------------------------------------------------------------------------------------


def _checked_columns(path: Path, text: str, needs: Sequence[str]) -> list[str]:
    reader = csv.reader(io.StringIO(text))
    try:
        columns = next(reader)
        missing = [column for column in needs if column not in columns]
        if missing:
            raise ValueError(f"{path} row 1: no column {', '.join(missing)}")
        twice = [column for index, column in enumerate(columns) if column in columns[:index]]
        if twice:
            raise ValueError(f"{path} row 1: the column {twice[0]!r} is there twice")
        for cells in reader:
            if len(cells) != len(columns):
                raise ValueError(f"{path} row {reader.line_num}: {len(cells)} cells, but {len(columns)} columns")
    except csv.Error as error:
        raise ValueError(f"{path} row {reader.line_num}: {error}") from error
    return columns


def _numeric(path: Path, cells: pd.Series) -> pd.Series:
    """A column as numbers, whole ones where they must be; ValueError names the first row with anything else."""
    numbers = pd.to_numeric(cells, errors="coerce")
    wrong, wanted = numbers.isna() & cells.notna(), "a number"
    if not wrong.any() and cells.name in (*WHOLE_COLUMNS, *MAYBE_WHOLE_COLUMNS):
        wanted = "a whole number"
        wrong = ~np.isfinite(numbers) | (numbers % 1 != 0)
        if cells.name in MAYBE_WHOLE_COLUMNS:
            wrong &= numbers.notna()
    if wrong.any():
        row = int(wrong.argmax())
        is_what = "is empty" if pd.isna(cells.iloc[row]) else f"is {str(cells.iloc[row])[:40]!r}"
        raise ValueError(f"{path} row {row + 2}: {cells.name} {is_what}; it must be {wanted}")
    return numbers.astype(np.int64) if cells.name in WHOLE_COLUMNS else numbers


def _incomplete(path: Path, rest: bytes) -> str:
    return f"{path}: dropped an incomplete last line, {rest.decode(errors='replace')!r}"


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


def _lines(data: bytes) -> list[bytes]:
    """The complete lines of a file, with their ends."""
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


def _cells(line: bytes) -> list[str] | None:
    """The cells of a line; None where it is not UTF-8 or no CSV."""
    try:
        return next(csv.reader([line.decode()]), [])
    except (UnicodeDecodeError, csv.Error):
        return None


def _written(rows: Iterable[Sequence[str]]) -> list[bytes]:
    """Rows of cells as lines of a file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return _lines(text.getvalue().encode())


def _as_text(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    value = np.asarray(value)
    if value.ndim:
        raise ValueError(f"column {column!r} has a value of shape {value.shape}, but a cell holds one number")
    return str(value[()])  # the shortest text that reads back as the same float32 or float64


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=CHECKSUM_BYTES).digest()


def _checksums(lines: Sequence[bytes]) -> bytearray:
    return bytearray().join(map(_digest, lines))


def _blocks(checksums: bytes, lines_per_block: int) -> list[str]:
    return [_digest(part).hex() for part in _split(checksums, lines_per_block * CHECKSUM_BYTES)]


def _split(whole: Any, size: int) -> list[Any]:
    return [whole[start : start + size] for start in range(0, len(whole), size)]

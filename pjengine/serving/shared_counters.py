"""Counters that several processes keep together, each in a row of its own of one file."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np


class SharedCounters:
    """float64 counters [rows, width] in a memory-mapped file.

    A row has one writer, so nothing is locked. A process that takes the place of one that died goes on with its row, so
    that no count ever falls.

    Args:
      path: the file; made where it does not exist.
      rows: processes; row: of this one.
      width: counters of each.

    Attributes:
      own: this process's row: a list of floats to read and write.
    """

    def __init__(self, path: Path, rows: int, row: int, width: int):
        size = 8 * rows * width
        with path.open("ab") as file:
            file.truncate(size)  # as long already where another process made it
        with path.open("r+b") as file:
            self._all = memoryview(mmap.mmap(file.fileno(), size)).cast("d")
        self._shape = rows, width
        self.own = self._all[row * width : (row + 1) * width]

    def total(self) -> list[float]:
        """Each counter, summed over the processes."""
        totals: list[float] = np.asarray(self._all).reshape(self._shape).sum(0).tolist()
        return totals

"""Where panels lie, and how much text fits: plain numbers, nothing is drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

_WIDE = 1.7
"""A panel is about so many times as wide as high."""
_LEAST = 36
"""Pixels that a panel is high, if that can be; in width, its form times as many."""
_LEAST_OTHERS = 2
"""With fewer panels beside it, a large one is as large as they are."""


@dataclass(frozen=True)
class Cell:
    row: int
    column: int
    rows: int = 1
    columns: int = 1


def arrange(
    large: Sequence[bool], width: float, height: float, gap_x: float, gap_y: float
) -> tuple[int, int, list[Cell]]:
    """Lay panels out in reading order; a large one takes two rows and two columns.

    Args:
        large: of each panel, at least one.
        width, height: of all together, pixels.
        gap_x, gap_y: between two panels.

    Returns:
        columns, rows and the cells of each panel: the grid whose panels have the best form and leave least room empty.
    """
    if large.count(False) < _LEAST_OTHERS:
        large = [False] * len(large)

    def cost(grid: tuple[int, int, list[Cell]]) -> float:
        columns, rows, cells = grid
        wide, high = (width - gap_x * (columns - 1)) / columns, (height - gap_y * (rows - 1)) / rows
        empty = 1 - sum(cell.rows * cell.columns for cell in cells) / (rows * columns)
        narrow = sum(max(_LEAST * form - size, 0.0) for size, form in ((wide, _WIDE), (high, 1.0)))
        return abs(math.log(max(wide, 1.0) / max(high, 1.0) / _WIDE)) + empty + narrow

    return min((_packed(large, columns) for columns in range(1, len(large) + 3 * sum(large) + 1)), key=cost)


def _packed(large: Sequence[bool], columns: int) -> tuple[int, int, list[Cell]]:
    taken: set[tuple[int, int]] = set()
    cells = []
    # Before these places there is no room, for small panels and for large ones.
    tried = {False: 0, True: 0}
    for is_large in large:
        high, wide = (2, min(2, columns)) if is_large else (1, 1)
        place = tried[is_large]
        while True:
            row, column = divmod(place, columns)
            covered = {(row + down, column + right) for down in range(high) for right in range(wide)}
            if column + wide <= columns and not covered & taken:
                break
            place += 1
        tried[is_large] = place
        taken |= covered
        cells.append(Cell(row, column, high, wide))
    return columns, max(cell.row + cell.rows for cell in cells), cells


@lru_cache(maxsize=8192)
def text_width(text: str, size: float) -> float:
    """In points, of one line without formulas, in the font that pictures are written in."""
    return float(text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)[0])


def fitted(text: str, size: float, room: float) -> str:
    """`text`, or as much of its beginning as fits into `room` points, with an ellipsis."""
    return _shortened(text, size, room, lambda kept: f"{text[:kept].rstrip()}…")


def fitted_name(name: str, size: float, room: float) -> str:
    """`name` without its middle where it is too long: names of runs often differ at their ends only."""
    return _shortened(name, size, room, lambda kept: f"{name[: kept - kept // 2]}…{name[len(name) - kept // 2 :]}")


def _shortened(text: str, size: float, room: float, shorten) -> str:
    if text_width(text, size) <= room:
        return text
    low, high = 0, len(text) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text_width(shorten(middle), size) <= room else (low, middle - 1)
    return shorten(low)


def wrapped(text: str, size: float, room: float) -> list[str]:
    """One line, or two that are broken between words; what does not fit into these goes."""
    if text_width(text, size) <= room:
        return [text]
    words = text.split(" ")
    ends = [n for n in range(1, len(words)) if text_width(" ".join(words[:n]), size) <= room]
    if not ends:
        return [fitted(text, size, room)]
    return [" ".join(words[: ends[-1]]), fitted(" ".join(words[ends[-1] :]), size, room)]

"""The places of panels, and how much text fits: plain numbers, nothing is drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

_WIDE = 1.7
"""Width of a panel divided by its height, about."""
_LEAST = 36
"""Least height of a panel in pixels, if there is room; the least width is its form times as much."""
_LEAST_OTHERS = 2
"""With fewer small panels beside it, a large panel is as small as they are."""
_LEAST_HEIGHT, _TINY = 50, 18
"""Least height in pixels of a panel beside a large one, and of any panel."""
FOOT = 16.0
"""Height in pixels of the line under the panels."""
TITLE_SIZE, NAME_SIZE, SMALL_SIZE = 9.5, 9, 8
"""Sizes in points of a panel's title, of a run's name, and of all other text."""


@dataclass(frozen=True)
class Cell:
    row: int
    column: int
    rows: int = 1
    columns: int = 1


def arrange(
    large: Sequence[bool], width: float, height: float, gap_x: float, gap_y: float
) -> tuple[int, int, list[Cell]]:
    """The grid whose panels have the best form and leave the least room empty. Panels lie in reading order; a large one
    takes two rows and two columns.

    Args:
        large: whether each panel is large; there is at least one panel.
        width, height: size of all panels together in pixels.
        gap_x, gap_y: pixels between two panels.

    Returns:
        columns, rows, and the cells of each panel.
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
    """The grid with so many columns, filled from the top, as `arrange` returns it."""
    taken: set[tuple[int, int]] = set()
    cells = []
    # Before these places there is no room for small panels and for large ones.
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
    """Width in points of one line without formulas, in the font of the pictures."""
    return float(text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)[0])


def fitted(text: str, size: float, room: float) -> str:
    """The text, or as much of its beginning as fits into `room` points, with an ellipsis."""
    return _shortened(text, size, room, lambda kept: f"{text[:kept].rstrip()}…")


def fitted_name(name: str, size: float, room: float) -> str:
    """The name, without its middle if it is too long: names of runs often differ only at their ends."""
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
    """One line, or two that are broken between words; text that does not fit into these is cut off."""
    if text_width(text, size) <= room:
        return [text]
    words = text.split(" ")
    ends = [n for n in range(1, len(words)) if text_width(" ".join(words[:n]), size) <= room]
    if not ends:
        return [fitted(text, size, room)]
    return [" ".join(words[: ends[-1]]), fitted(" ".join(words[ends[-1] :]), size, room)]


@dataclass(frozen=True)
class Grid:
    """The places of panels with their titles above, in pixels."""

    cells: list[Cell]
    titles: list[list[str]]
    """Lines of each title."""
    left: float
    tops: list[float]
    """Top of the panels in each row."""
    cell: tuple[float, float]
    """Width and height of a small panel."""
    gap: float
    """Pixels between two columns."""

    def box(self, cell: Cell) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of a panel."""
        wide, high = self.cell
        left = self.left + cell.column * (wide + self.gap)
        right = left + cell.columns * (wide + self.gap) - self.gap
        return left, self.tops[cell.row], right, self.tops[cell.row + cell.rows - 1] + high


def fitting_grid(
    large: Sequence[bool], titles: Sequence[str], room: tuple[float, float, float], foot: float, unit: float
) -> Grid:
    """A grid of as many panels as there is room for, but one at least.

    Args:
        large: whether each panel is large.
        titles: title of each panel.
        room: width, height, and the height that is taken above.
        foot: height that is taken below, before `unit`, if there is room for all panels.
    """
    for count in range(len(large), 0, -1):
        grid = _grid(large[:count], titles[:count], (*room, foot * unit), unit)
        if min(grid.cell[0] / 1.7, grid.cell[1]) > _TINY * unit:
            break
        foot = FOOT
    return grid


def _grid(
    large: Sequence[bool], titles: Sequence[str], room: tuple[float, float, float, float], unit: float
) -> Grid:
    """The grid of all these panels.

    Args:
        room: width, height, and the heights that are taken above and below.
    """
    width, height, top, foot = room
    left, right, gap_x, gap_y, bottom = (n * unit for n in (58, 24, 66, 34, 42))
    for is_large in (large, [False] * len(large)):
        net = (width - left - right) / unit, (height - top - bottom - foot) / unit - 22
        columns, rows, cells = arrange(is_large, *net, gap_x / unit, gap_y / unit + 22)
        wide = max((width - left - right - gap_x * (columns - 1)) / columns, 20.0)
        texts = []
        for title, cell in zip(titles, cells):
            beside = right - 4 * unit if cell.column + cell.columns == columns else gap_x - 14 * unit
            room_of_title = points((cell.columns * (wide + gap_x) - gap_x + beside) / unit)
            texts.append(wrapped(title, TITLE_SIZE, room_of_title))
        above = [22.0 * unit] * rows
        for cell, lines in zip(cells, texts):
            above[cell.row] = max(above[cell.row], (10 + 12 * len(lines)) * unit)
        high = (height - top - bottom - foot - sum(above) - gap_y * (rows - 1)) / rows
        # Where a large panel leaves no room for the others, it is as small as they are.
        if high >= _LEAST_HEIGHT * unit:
            break
    high = max(high, 10.0)
    tops = [top + sum(above[: row + 1]) + row * (high + gap_y) for row in range(rows)]
    return Grid(cells, texts, left, tops, (wide, high), gap_x)


def is_lowest(cell: Cell, cells: Sequence[Cell]) -> bool:
    """Whether there is no panel below."""
    columns = set(range(cell.column, cell.column + cell.columns))
    return not any(
        other.row > cell.row and columns & set(range(other.column, other.column + other.columns)) for other in cells
    )


def points(pixels: float) -> float:
    """The same length in points, before `unit`: a hundred pixels are an inch, as are 72 points."""
    return 0.72 * pixels

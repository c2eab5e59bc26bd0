"""A report card as plain data. All its texts are plain: the writers (markdown.py, page.py) escape them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Tone = Literal["", "good", "bad", "note"]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names with their values, one below the other."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Cells in rows. The first column names its row; the others hold numbers or short words."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    folded: bool = False
    """Whether the page shows it when it is asked to."""


@dataclass(frozen=True)
class Verbatim:
    """A text in which each space counts: a command, or what a model wrote."""

    text: str
    title: str = ""
    tone: Tone = ""


class Series(NamedTuple):
    """A curve. A point is (x, y); y may be NaN, which is a gap."""

    name: str
    points: Sequence[tuple[float, float]]
    style: Literal["line", "faint", "dashed", "dots"] = "line"
    """A faint curve is the one that the next series smooths, and has that one's colour."""
    spread: Sequence[tuple[float, float]] = ()
    """With dots: lowest and highest value of each, its 95% interval."""


@dataclass(frozen=True)
class Chart:
    """Curves over one x axis."""

    title: str
    x_name: str
    y_name: str
    series: Sequence[Series]
    marks: Sequence[float] = ()
    """Places on the x axis at which a later launch began."""


Block = Text | Heading | Facts | Table | Verbatim | Chart


@dataclass(frozen=True)
class Section:
    """A part of a card."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Card:
    """A page."""

    title: str
    made: str
    """When, and by what."""
    remarks: Sequence[str]
    """One sentence for each thing that is missing, damaged or must be known before the figures are compared."""
    summary: Facts
    sections: Sequence[Section]

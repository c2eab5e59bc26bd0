"""Colours that tell runs from each other, on light and on dark paper; from the thirteenth run on, also marks.

The twelve colours were found by a search, on light paper and, 22 steps of CIELAB's lightness higher, on dark paper. It
made the nearest two of them as different as possible by CIEDE2000 for readers with ordinary sight, with protanopia and
with deuteranopia (simulated as by Machado, Oliveira and Fernandes, 2009): they are at least 9.6 apart, and 19 for
ordinary sight. The style of a line says what it is (training, validation, chosen, rejected), so a run's second mark is
a form upon its line.
"""

COLOURS = (
    "#2f7de1", "#e8710a", "#9b0052", "#006a6a", "#000fff", "#a30202", "#2e602d", "#bd6a96", "#827a4c", "#22abc3",
    "#60568c", "#d58d82",
)  # fmt: skip
_ON_DARK = dict(zip(COLOURS, (
    "#7eb6ff", "#ffac4e", "#dc5189", "#50a3a3", "#8052ff", "#e95236", "#659961", "#fda5d2", "#bdb483", "#74e8ff",
    "#9a8dc7", "#ffc9bc",
)))  # fmt: skip
MARKS = ("", "s", "D", "v", "P", "*")
"""matplotlib's names: none, square, diamond, triangle, plus, star."""


def look(number: int) -> tuple[str, str]:
    """Colour and mark of the run with this number, from 0."""
    cycle, place = divmod(number, len(COLOURS))
    return COLOURS[place], MARKS[cycle % len(MARKS)]


def on_paper(colour: str, dark: bool) -> str:
    """The colour as it is drawn on light or dark paper."""
    return _ON_DARK.get(colour, colour) if dark else colour

"""Pictures and tables of what is shown, as files."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from utils.files import atomic_write
from viewer.drawing.figure import MOST_PANELS, draw
from viewer.panels import Panel, chosen_panels, runs_of
from viewer.view import ShownRun, View

_CANVASES = {".png": FigureCanvasAgg, ".svg": FigureCanvasSVG, ".pdf": FigureCanvasPdf}


def check_suffix(path: Path) -> str:
    """The suffix of the file, which is its format.

    Raises:
        ValueError: there is no such format.
    """
    suffix = path.suffix.lower()
    if suffix not in _CANVASES and suffix != ".csv":
        raise ValueError(f"{path} ends in none of {', '.join(_CANVASES)}, .csv")
    return suffix


def save(path: Path, runs: Sequence[ShownRun], view: View, size: tuple[int, int], scale: float = 1.0) -> int:
    """Write a picture, or, with .csv, the numbers of the shown panels.

    Args:
        size: width and height in pixels, before `scale`.

    Returns:
        the number of panels in it.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written.
    """
    suffix = check_suffix(path)
    if suffix == ".csv":
        panels = chosen_panels(runs, view)[:MOST_PANELS]
        atomic_write(path, _table(runs, panels).encode())
        return len(panels)
    figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100 * scale)
    canvas = _CANVASES[suffix](figure)
    drawn = draw(figure, runs, view)
    picture = io.BytesIO()
    getattr(canvas, f"print_{suffix[1:]}")(picture)
    atomic_write(path, picture.getvalue())
    return len(drawn)


def _table(runs: Sequence[ShownRun], panels: Sequence[Panel]) -> str:
    """One row for each record: run, kind of record, step, time, tokens, then the metrics of the shown panels."""
    wanted: dict[str, dict[str, None]] = {}
    for panel in panels:
        for curve in panel.curves:
            wanted.setdefault(curve.table, {})[curve.metric] = None
    metrics = list(dict.fromkeys(metric for found in wanted.values() for metric in found))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "record", "step", "time", "tokens", *map(_cell, metrics)])
    for run in [run for run in runs if any(run in runs_of(panel, runs) for panel in panels)]:
        for table, found in wanted.items():
            columns = run.snapshot.tables.get(table)
            if columns is None or not any(metric in columns for metric in found):
                continue
            tokens = run.snapshot.tokens(table)
            for row in range(len(columns["step"])):
                values = [columns[m][row] if m in found and m in columns else math.nan for m in metrics]
                writer.writerow([
                    _cell(run.label), _cell(table), int(columns["step"][row]), f"{columns['time'][row]:.3f}",
                    int(tokens[row]) if math.isfinite(tokens[row]) else "",
                    *("" if math.isnan(value) else repr(float(value)) for value in values),
                ])  # fmt: skip
    return text.getvalue()


def _cell(text: str) -> str:
    """A spreadsheet would run a text that begins like a formula."""
    return f"'{text}" if text[:1] in "=+-@" else text

"""The panels on the screen. matplotlib draws in a thread of its own; Qt's thread shows the picture and paints what
follows the mouse over it, so that it never waits. Until a zoomed picture is there, the last one is stretched."""

import gc
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PyQt5.QtCore import QObject, QPoint, QPointF, QRectF, QSize, Qt, pyqtSignal
from PyQt5.QtGui import QColor, QFont, QImage, QPainter, QPen, QPolygonF
from PyQt5.QtWidgets import QWidget

from viewer.panels import DrawnPanel, ShownRun, View, draw, theme_of, value_text, without_zoom, x_text
from viewer.text import translate

logger = logging.getLogger(__name__)

_LEAST_DRAG = 6
"""Pixels; less is a click."""
_DAYS = (-200_000, 2_000_000)
"""Since 1970: what matplotlib can name the dates of, with room to spare."""


@dataclass(frozen=True)
class Picture:
    image: QImage
    panels: list[DrawnPanel]
    view: View
    seconds: float
    """That it took."""


class Reading(NamedTuple):
    """A curve's point beside the cursor."""

    label: str
    colour: str
    mark: str
    x: float
    y: float
    measured: float | None
    """Before smoothing."""


class Draughtsman(QObject):
    """Draws in a thread of its own, always the newest request only."""

    drawn = pyqtSignal(object)
    """A Picture."""
    done = pyqtSignal(str)
    """What `later` has to say."""

    def __init__(self):
        super().__init__()
        self._condition = threading.Condition()
        self._request: tuple | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="draughtsman", daemon=True)
        self._thread.start()

    def request(self, runs: Sequence[ShownRun], view: View, size: QSize, scale: float) -> None:
        with self._condition:
            self._request = (runs, view, size, scale)
            self._condition.notify()

    def later(self, action: Callable[[], str]) -> None:
        """Run something long beside all; what it returns comes back as `done`."""
        threading.Thread(target=lambda: self.done.emit(action()), daemon=True).start()

    def stop(self) -> None:
        with self._condition:
            self._stopped = True
            self._condition.notify()
        self._thread.join(5.0)

    def _work(self) -> None:
        while True:
            with self._condition:
                while self._request is None and not self._stopped:
                    self._condition.wait()
                if self._stopped:
                    return
                request, self._request = self._request, None
            try:
                picture = _draw(*request)
            except Exception:
                # What one file holds must not end the view of the others; the picture before stays.
                logger.exception("this cannot be drawn")
                continue
            self.drawn.emit(picture)
            del picture, request
            gc.collect(1)


def _draw(runs: Sequence[ShownRun], view: View, size: QSize, scale: float) -> Picture:
    started = time.monotonic()
    figure = Figure(figsize=(size.width() / 100, size.height() / 100), dpi=100 * scale)
    canvas = FigureCanvasAgg(figure)
    panels = [
        replace(panel, box=tuple(edge / scale for edge in panel.box)) for panel in draw(figure, runs, view)
    ]  # fmt: skip
    canvas.draw()
    width, height = canvas.get_width_height(physical=True)
    image = QImage(bytes(canvas.buffer_rgba()), width, height, 4 * width, QImage.Format_RGBA8888).copy()
    image.setDevicePixelRatio(scale)
    return Picture(image, panels, view, time.monotonic() - started)


class Canvas(QWidget):
    """Shows a picture; zoom, pan and crosshair."""

    zoomed = pyqtSignal(object)
    """A View with other ranges."""
    resized = pyqtSignal()

    def __init__(self):
        super().__init__()
        self.setMouseTracking(True)
        self.setMinimumSize(320, 240)
        self.setAttribute(Qt.WA_OpaquePaintEvent)
        self.pans = False
        """The left button moves."""
        self._picture: Picture | None = None
        self._view = View()
        self._mouse: QPoint | None = None
        self._from: QPoint | None = None
        self._panel: DrawnPanel | None = None
        self._panned: View | None = None

    def show_picture(self, picture: Picture) -> None:
        self._picture = picture
        self.update()

    def set_view(self, view: View) -> None:
        """What is asked for, though its picture may still be on its way."""
        self._view = view
        self.update()

    def panel_at(self, point: QPoint) -> DrawnPanel | None:
        for panel in self._picture.panels if self._picture else ():
            left, top, right, bottom = panel.box
            if left <= point.x() <= right and top <= point.y() <= bottom:
                return panel
        return None

    def ranges(self, panel: DrawnPanel) -> tuple[tuple[float, float], tuple[float, float]]:
        """Of x and y, as asked for."""
        y_range = dict(self._view.y_ranges).get(panel.panel.key, panel.y_range)
        return self._view.x_range or panel.x_range, y_range

    def place(self, panel: DrawnPanel, point: QPointF | QPoint) -> tuple[float, float]:
        """x and y under a point."""
        left, top, right, bottom = panel.box
        across = (point.x() - left) / (right - left)
        up = (bottom - point.y()) / (bottom - top)
        (x0, x1), y = self.ranges(panel)
        y0, y1 = _scaled(y, panel.log_y)
        return x0 + across * (x1 - x0), _unscaled(y0 + up * (y1 - y0), panel.log_y)

    def paintEvent(self, _event) -> None:
        painter = QPainter(self)
        theme = theme_of(self._view)
        painter.fillRect(self.rect(), QColor(theme.paper))
        if self._picture is None:
            return
        painter.drawImage(QPointF(0, 0), self._picture.image)
        for panel in self._picture.panels:
            self._stretch(painter, panel)
        self._paint_rubber_band(painter)
        self._paint_crosshair(painter)

    def _stretch(self, painter: QPainter, panel: DrawnPanel) -> None:
        """Where the ranges asked for are not those of the picture, show that part of it as large as it will be."""
        x, y = self.ranges(panel)
        if x == panel.x_range and y == panel.y_range:
            return
        left, top, right, bottom = panel.box
        old_y, new_y = _scaled(panel.y_range, panel.log_y), _scaled(y, panel.log_y)
        width, height = right - left, bottom - top
        x0, x1 = ((edge - x[0]) / (x[1] - x[0]) for edge in panel.x_range)
        y0, y1 = ((edge - new_y[0]) / (new_y[1] - new_y[0]) for edge in old_y)
        target = QRectF(left + x0 * width, bottom - y1 * height, (x1 - x0) * width, (y1 - y0) * height)
        box, scale = QRectF(left, top, width, height), self._picture.image.devicePixelRatio()
        source = QRectF(left * scale, top * scale, width * scale, height * scale)
        painter.save()
        painter.setClipRect(box)
        painter.fillRect(box, QColor(theme_of(self._view).paper))
        painter.drawImage(target, self._picture.image, source)
        painter.restore()

    def _paint_rubber_band(self, painter: QPainter) -> None:
        if self._from is None or self._panel is None or self._panned is not None or self._mouse is None:
            return
        rect = self._banded()
        if rect is not None:
            colour = QColor(theme_of(self._view).faint)
            painter.setPen(QPen(colour, 1))
            colour.setAlpha(40)
            painter.fillRect(rect, colour)
            painter.drawRect(rect)

    def _banded(self) -> QRectF | None:
        """What is framed; a flat frame means the whole height, a thin one the whole width."""
        left, top, right, bottom = self._panel.box
        x0, x1 = sorted(min(max(p.x(), left), right) for p in (self._from, self._mouse))
        y0, y1 = sorted(min(max(p.y(), top), bottom) for p in (self._from, self._mouse))
        wide, high = x1 - x0 >= _LEAST_DRAG, y1 - y0 >= _LEAST_DRAG
        if not wide and not high:
            return None
        return QRectF(QPointF(x0 if wide else left, y0 if high else top), QPointF(x1 if wide else right,
                                                                               y1 if high else bottom))  # fmt: skip

    def _paint_crosshair(self, painter: QPainter) -> None:
        panel = self.panel_at(self._mouse) if self._mouse is not None and self._from is None else None
        if panel is None:
            return
        theme = theme_of(self._view)
        pen = QPen(QColor(theme.faint), 1, Qt.DotLine)
        painter.setPen(pen)
        x, y = self.place(panel, self._mouse)
        for other in self._picture.panels:
            at = self.across(other, x)
            if at is not None:
                painter.drawLine(QPointF(at, other.box[1]), QPointF(at, other.box[3]))
        painter.drawLine(QPointF(panel.box[0], self._mouse.y()), QPointF(panel.box[2], self._mouse.y()))
        font = QFont(self.font())
        font.setPointSizeF(max(font.pointSizeF() * 0.9, 7.0))
        painter.setFont(font)
        self._paint_level(painter, panel, y)
        readings = self.read_off(panel, x)
        self._paint_points(painter, panel, readings)
        self._paint_values(painter, readings, x)

    def _paint_level(self, painter: QPainter, panel: DrawnPanel, y: float) -> None:
        """The cursor's own height, on the axis."""
        theme, metrics, text = theme_of(self._view), painter.fontMetrics(), value_text(y)
        width, height = metrics.horizontalAdvance(text) + 6, metrics.height()
        box = QRectF(max(panel.box[0] - width - 2, 0), self._mouse.y() - height / 2, width, height)
        painter.fillRect(box, QColor(theme.grid))
        painter.setPen(QColor(theme.ink))
        painter.drawText(box, Qt.AlignCenter, text)

    def _paint_points(self, painter: QPainter, panel: DrawnPanel, readings: list[Reading]) -> None:
        """Which points the values are of."""
        painter.save()
        painter.setClipRect(QRectF(*panel.box[:2], panel.box[2] - panel.box[0], panel.box[3] - panel.box[1]))
        painter.setRenderHint(QPainter.Antialiasing)
        painter.setPen(QPen(QColor(theme_of(self._view).paper), 1))
        for reading in readings:
            at = self.point(panel, reading.x, reading.y)
            if at is not None:
                painter.setBrush(QColor(reading.colour))
                painter.drawEllipse(at, 3.5, 3.5)
        painter.restore()

    def across(self, panel: DrawnPanel, x: float) -> float | None:
        """Where a place on the x axis lies on the screen, if it does; panels of other runs reach over other steps."""
        left, _, right, _ = panel.box
        x0, x1 = self.ranges(panel)[0]
        share = (x - x0) / (x1 - x0)
        return left + share * (right - left) if 0 <= share <= 1 else None

    def point(self, panel: DrawnPanel, x: float, y: float) -> QPointF | None:
        """Where a value lies on the screen, if it does."""
        at, y_range = self.across(panel, x), self.ranges(panel)[1]
        if at is None or not math.isfinite(y) or panel.log_y and y <= 0:
            return None
        (y0, y1), (y, _) = _scaled(y_range, panel.log_y), _scaled((y, y), panel.log_y)
        share = (y - y0) / (y1 - y0)
        return QPointF(at, panel.box[3] - share * (panel.box[3] - panel.box[1])) if 0 <= share <= 1 else None

    def read_off(self, panel: DrawnPanel, x: float) -> list[Reading]:
        """Each curve's point nearest to x, of those that reach it."""
        found = []
        x0, x1 = self.ranges(panel)[0]
        for curve in panel.curves:
            if not len(curve.x):
                continue
            after = int(np.searchsorted(curve.x, x))
            near = [index for index in (after - 1, after) if 0 <= index < len(curve.x)]
            index = min(near, key=lambda i: abs(curve.x[i] - x))
            if abs(curve.x[index] - x) <= 0.05 * (x1 - x0):
                measured = None if curve.measured is None else float(curve.measured[index])
                at, value = float(curve.x[index]), float(curve.y[index])
                found.append(Reading(curve.label, curve.colour, curve.mark, at, value, measured))
        return found

    def told(self, readings: list[Reading], x: float) -> tuple[str, list[tuple[Reading, str]]]:
        """What stands beside the cursor: the place of the point nearest to it, and each curve's value there, the
        highest first. A value that was measured at another place says where."""
        language = self._view.language
        unit = self._view.x if self._view.x in ("time", "clock") else translate(self._view.x, language)
        at = min((reading.x for reading in readings), key=lambda place: abs(place - x), default=x)
        heading = x_text(at, unit)
        if any(reading.measured is not None for reading in readings):
            heading += f"   ·   {translate('smoothed (measured)', language)}"
        rows = []
        for reading in sorted(readings, key=lambda reading: -reading.y if reading.y == reading.y else math.inf):
            text = value_text(reading.y)
            if reading.measured is not None:
                text += f" ({value_text(reading.measured)})"
            if reading.x != at:
                text += f"   {translate('at {}', language).format(x_text(reading.x, unit))}"
            rows.append((reading, text))
        return heading, rows

    def _paint_values(self, painter: QPainter, readings: list[Reading], x: float) -> None:
        theme, metrics = theme_of(self._view), painter.fontMetrics()
        heading, rows = self.told(readings, x)
        line = metrics.height() + 2
        rows, more = self._nearest(rows, max(int((self.height() - 14) / line) - 2, 1))
        name_width = max((metrics.horizontalAdvance(reading.label) for reading, _ in rows), default=0)
        value_width = max((metrics.horizontalAdvance(text) for _, text in rows), default=0)
        width = max(metrics.horizontalAdvance(heading), 16 + name_width + 14 + value_width) + 16
        height = line * (1 + len(rows) + bool(more)) + 10
        left = self._mouse.x() + 14
        left = left if left + width < self.width() else max(self._mouse.x() - 14 - width, 0)
        top = min(max(self._mouse.y() + 14, 0), max(self.height() - height - 2, 0))
        box, paper = QRectF(left, top, width, height), QColor(theme.paper)
        paper.setAlpha(235)
        painter.fillRect(box, paper)
        painter.setPen(QPen(QColor(theme.grid), 1))
        painter.drawRect(box)
        painter.setPen(QColor(theme.faint))
        base = top + 5 + metrics.ascent()
        painter.drawText(QPointF(left + 8, base), heading)
        for number, (reading, text) in enumerate(rows, 1):
            at = base + number * line
            paint_stroke(painter, left + 8, at - metrics.ascent() / 2 + 0.5, 12, reading.colour, reading.mark)
            painter.setPen(QColor(theme.ink))
            painter.drawText(QPointF(left + 24, at), reading.label)
            painter.drawText(QPointF(left + width - 8 - metrics.horizontalAdvance(text), at), text)
        if more:
            painter.setPen(QColor(theme.faint))
            text = translate("and {} more", self._view.language).format(more)
            painter.drawText(QPointF(left + 24, base + (len(rows) + 1) * line), text)

    def _nearest(self, rows: list[tuple[Reading, str]], most: int) -> tuple[list[tuple[Reading, str]], int]:
        """Those next to the cursor's height, if there is no room for all; how many there are besides."""
        if len(rows) <= most:
            return rows, 0
        panel = self.panel_at(self._mouse)
        height = self.place(panel, self._mouse)[1]
        # Rows fall: those from `first` on lie below the cursor.
        first = sum(reading.y > height for reading, _ in rows)
        first = min(max(first - most // 2, 0), len(rows) - most)
        return rows[first : first + most], len(rows) - most

    def mousePressEvent(self, event) -> None:
        panel = self.panel_at(event.pos())
        if panel is None or event.button() not in (Qt.LeftButton, Qt.RightButton, Qt.MiddleButton):
            return
        self._from, self._panel = event.pos(), panel
        moves = self.pans or event.button() != Qt.LeftButton
        self._panned = self._view if moves else None
        if moves:
            self.setCursor(Qt.ClosedHandCursor)

    def mouseMoveEvent(self, event) -> None:
        self._mouse = event.pos()
        if self._from is not None and self._panned is not None:
            self._pan(event.pos())
        self.update()

    def _pan(self, to: QPoint) -> None:
        panel, start = self._panel, self._panned
        left, top, right, bottom = panel.box
        x = start.x_range or panel.x_range
        y = dict(start.y_ranges).get(panel.panel.key, panel.y_range)
        across = (self._from.x() - to.x()) / (right - left) * (x[1] - x[0])
        y0, y1 = _scaled(y, panel.log_y)
        up = (to.y() - self._from.y()) / (bottom - top) * (y1 - y0)
        moved = (_unscaled(y0 + up, panel.log_y), _unscaled(y1 + up, panel.log_y))
        self._change(start, panel, (x[0] + across, x[1] + across), moved if abs(to.y() - self._from.y()) > 3 else None)

    def mouseReleaseEvent(self, event) -> None:
        self._mouse = event.pos()
        if self._from is not None and self._panned is None and self._panel is not None:
            band = self._banded()
            if band is not None:
                (x0, y0), (x1, y1) = (self.place(self._panel, p) for p in (band.bottomLeft(), band.topRight()))
                top, bottom = self._panel.box[1], self._panel.box[3]
                whole_height = band.height() >= bottom - top - 1e-6
                self._change(self._view, self._panel, (x0, x1), None if whole_height else (y0, y1))
        self._from = self._panel = self._panned = None
        self.unsetCursor()
        self.update()

    def mouseDoubleClickEvent(self, event) -> None:
        """A panel gets all the room, or gives it back; beside the panels: no zoom."""
        panel = self.panel_at(event.pos())
        if panel is None:
            self.zoomed.emit(without_zoom(self._view))
        else:
            self.zoomed.emit(replace(self._view, alone="" if self._view.alone else panel.panel.key))

    def leaveEvent(self, _event) -> None:
        self._mouse = None
        self.update()

    def wheelEvent(self, event) -> None:
        panel = self.panel_at(event.pos())
        turned = event.angleDelta().y() or event.angleDelta().x()
        if panel is None or not turned:
            return
        factor = 0.8 ** (turned / 120)
        x, y = self.place(panel, event.pos())
        x_range, y_range = self.ranges(panel)
        if event.modifiers() & Qt.ShiftModifier:
            low, high = _scaled(y_range, panel.log_y)
            at = _scaled((y, y), panel.log_y)[0]
            ends = (at + (edge - at) * factor for edge in (low, high))
            self._change(self._view, panel, None, tuple(_unscaled(edge, panel.log_y) for edge in ends))
        else:
            self._change(self._view, panel, tuple(x + (edge - x) * factor for edge in x_range), None)

    def _change(self, view: View, panel: DrawnPanel, x: tuple | None, y: tuple | None) -> None:
        """Ask for other ranges, unless they are too narrow or too wide for floats."""
        y_ranges = dict(view.y_ranges)
        if y is not None:
            y_ranges[panel.panel.key] = y
        new = replace(view, x_range=x or view.x_range, y_ranges=tuple(y_ranges.items()))
        for low, high in (new.x_range or (0.0, 1.0), *y_ranges.values()):
            size = max(abs(low), abs(high))
            if not (math.isfinite(low) and math.isfinite(high) and 1e-12 * size < high - low < 1e305):
                return
        if new.x == "clock" and new.x_range and not (_DAYS[0] < new.x_range[0] and new.x_range[1] < _DAYS[1]):
            return
        self._view = new
        self.zoomed.emit(new)

    def resizeEvent(self, _event) -> None:
        self.resized.emit()


def paint_stroke(painter: QPainter, left: float, middle: float, width: float, colour: str, mark: str) -> None:
    """A piece of a run's curve, with its mark."""
    painter.save()
    painter.setRenderHint(QPainter.Antialiasing)
    painter.setPen(Qt.NoPen)
    painter.setBrush(QColor(colour))
    painter.drawRect(QRectF(left, middle - 1.5, width, 3))
    centre = QPointF(left + width / 2, middle)
    if mark:
        painter.drawPolygon(QPolygonF([centre + QPointF(4.5 * x, 4.5 * y) for x, y in _FORMS[mark]]))
    painter.restore()


def _star(points: int, inner: float, turned: float = 0.0) -> list[tuple[float, float]]:
    """Corners around a centre, by turns at 1 and at `inner` from it."""
    return [
        ((1, inner)[n % 2] * math.sin(turned + math.pi * n / points),
         -(1, inner)[n % 2] * math.cos(turned + math.pi * n / points)) for n in range(2 * points)
    ]  # fmt: skip


_FORMS = {
    "s": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)], "D": [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
    "v": [(-1.1, -0.8), (1.1, -0.8), (0, 1.1)], "P": _star(4, 0.45), "*": _star(5, 0.4),
}  # fmt: skip
"""Of colours.MARKS, as matplotlib draws them, about."""


def _scaled(ends: tuple[float, float], log: bool) -> tuple[float, float]:
    return (math.log10(ends[0]), math.log10(ends[1])) if log and ends[0] > 0 else ends


def _unscaled(value: float, log: bool) -> float:
    return 10 ** min(max(value, -305.0), 305.0) if log else value

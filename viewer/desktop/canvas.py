"""The panels on the screen: a picture, and what follows the mouse over it. Until a zoomed picture is there, the last
one is stretched."""

from dataclasses import replace

from PyQt5.QtCore import QPoint, QPointF, QRectF, Qt, pyqtSignal
from PyQt5.QtGui import QColor, QFont, QPainter, QPen
from PyQt5.QtWidgets import QWidget

from viewer.desktop.draughtsman import Picture
from viewer.desktop.strokes import paint_stroke
from viewer.formats import value_text
from viewer.picture import (
    DrawnPanel,
    Range,
    Reading,
    across,
    moved,
    nearest,
    panel_at,
    place_of,
    ranges,
    read_off,
    scaled,
    told,
    values_at,
    with_ranges,
    zoomed_at,
)
from viewer.text import translate
from viewer.view import View, theme_of, without_zoom

_LEAST_DRAG = 6
"""Pixels; a shorter movement is a click."""


class Canvas(QWidget):
    """Shows a picture, with zoom, pan and crosshair."""

    zoomed = pyqtSignal(object)
    """A View with other ranges."""
    resized = pyqtSignal()

    def __init__(self):
        super().__init__()
        self.setMouseTracking(True)
        self.setMinimumSize(320, 240)
        self.setAttribute(Qt.WA_OpaquePaintEvent)
        self.pans = False
        """Whether the left button moves."""
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
        """Set the view that is asked for; its picture may come later."""
        self._view = view
        self.update()

    def panel_at(self, point: QPoint) -> DrawnPanel | None:
        return panel_at(self._picture.panels if self._picture else (), point.x(), point.y())

    def ranges(self, panel: DrawnPanel) -> tuple[Range, Range]:
        """The ranges of x and y that are asked for."""
        return ranges(panel, self._view)

    def place(self, panel: DrawnPanel, point: QPointF | QPoint) -> tuple[float, float]:
        """x and y under a point."""
        return values_at(panel, self._view, point.x(), point.y())

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
        """Show the part of the picture that was asked for, as large as it will be, until its own picture is there."""
        x, y = self.ranges(panel)
        if x == panel.x_range and y == panel.y_range:
            return
        left, top, right, bottom = panel.box
        old_y, new_y = scaled(panel.y_range, panel.log_y), scaled(y, panel.log_y)
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
        """The frame that the mouse draws. A flat one means the whole height, a thin one the whole width."""
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
        """Paint the cursor's own y on the axis."""
        theme, metrics, text = theme_of(self._view), painter.fontMetrics(), value_text(y)
        width, height = metrics.horizontalAdvance(text) + 6, metrics.height()
        box = QRectF(max(panel.box[0] - width - 2, 0), self._mouse.y() - height / 2, width, height)
        painter.fillRect(box, QColor(theme.grid))
        painter.setPen(QColor(theme.ink))
        painter.drawText(box, Qt.AlignCenter, text)

    def _paint_points(self, painter: QPainter, panel: DrawnPanel, readings: list[Reading]) -> None:
        """Paint dots on the points whose values are shown."""
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
        """How far right an x lies on the screen; None outside of the panel."""
        return across(panel, self._view, x)

    def point(self, panel: DrawnPanel, x: float, y: float) -> QPointF | None:
        """The place of a point on the screen; None outside of the panel."""
        place = place_of(panel, self._view, x, y)
        return None if place is None else QPointF(*place)

    def read_off(self, panel: DrawnPanel, x: float) -> list[Reading]:
        return read_off(panel, self._view, x)

    def told(self, readings: list[Reading], x: float) -> tuple[str, list[tuple[Reading, str]]]:
        return told(readings, self._view, x)

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
        """The rows nearest to the cursor if there is no room for all, and the number of the others."""
        panel = self.panel_at(self._mouse)
        return nearest(rows, self.place(panel, self._mouse)[1], most)

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
            by = event.pos() - self._from
            self._ask_for(moved(self._panned, self._panel, by.x(), by.y()))
        self.update()

    def mouseReleaseEvent(self, event) -> None:
        self._mouse = event.pos()
        if self._from is not None and self._panned is None and self._panel is not None:
            band = self._banded()
            if band is not None:
                (x0, y0), (x1, y1) = (self.place(self._panel, p) for p in (band.bottomLeft(), band.topRight()))
                top, bottom = self._panel.box[1], self._panel.box[3]
                whole_height = band.height() >= bottom - top - 1e-6
                y = None if whole_height else (y0, y1)
                self._ask_for(with_ranges(self._view, self._panel, (x0, x1), y))
        self._from = self._panel = self._panned = None
        self.unsetCursor()
        self.update()

    def mouseDoubleClickEvent(self, event) -> None:
        """On a panel, give it all the room or take that back; beside the panels, undo the zoom."""
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
        along_y = bool(event.modifiers() & Qt.ShiftModifier)
        place = event.pos().x(), event.pos().y()
        self._ask_for(zoomed_at(self._view, panel, place, 0.8 ** (turned / 120), along_y))

    def _ask_for(self, view: View | None) -> None:
        if view is not None:
            self._view = view
            self.zoomed.emit(view)

    def resizeEvent(self, _event) -> None:
        self.resized.emit()

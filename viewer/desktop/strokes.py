"""Pieces of curves with their marks, painted by Qt."""

import math

from PyQt5.QtCore import QPointF, QRectF, Qt
from PyQt5.QtGui import QColor, QPainter, QPolygonF


def paint_stroke(painter: QPainter, left: float, middle: float, width: float, colour: str, mark: str) -> None:
    """Paint a piece of a run's curve with its mark."""
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
    """Corners of a star around the origin, alternately at distance 1 and `inner`."""
    return [
        ((1, inner)[n % 2] * math.sin(turned + math.pi * n / points),
         -(1, inner)[n % 2] * math.cos(turned + math.pi * n / points)) for n in range(2 * points)
    ]  # fmt: skip


_FORMS = {
    "s": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)], "D": [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
    "v": [(-1.1, -0.8), (1.1, -0.8), (0, 1.1)], "P": _star(4, 0.45), "*": _star(5, 0.4),
}  # fmt: skip
"""Corners of colours.MARKS, about as matplotlib draws them."""

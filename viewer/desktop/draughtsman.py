"""Lets matplotlib draw in a thread of its own, so that Qt's thread never waits."""

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PyQt5.QtCore import QObject, QSize, pyqtSignal
from PyQt5.QtGui import QImage

from viewer.drawing.figure import draw
from viewer.picture import DrawnPanel
from viewer.view import ShownRun, View

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """A drawn view."""

    image: QImage
    panels: list[DrawnPanel]
    view: View
    seconds: float
    """Time that drawing took."""


class Draughtsman(QObject):
    """Draws the newest request in a thread of its own; older ones are dropped."""

    drawn = pyqtSignal(object)
    """A Picture."""
    done = pyqtSignal(str)
    """The text that an action of `later` returned."""

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
        """Run a long action in another thread; `done` brings the text that it returns."""
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
                # A file with strange contents must not end the view of the others; the last picture stays.
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

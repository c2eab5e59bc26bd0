"""The row of tools above the table."""

from collections.abc import Callable
from dataclasses import replace

from PyQt5.QtCore import Qt, pyqtSignal
from PyQt5.QtWidgets import QAction, QComboBox, QLabel, QSlider, QToolBar

from viewer.curves import WEIGHTS
from viewer.text import translate
from viewer.view import X_AXES, View, without_zoom

_SMOOTHINGS = (None, *WEIGHTS)
"""Weights on the slider. None: chosen by the length of each curve."""


class Tools(QToolBar):
    """Switches and buttons, most of which change the view.

    Args:
        view: the view with which the window opens.
        differs: shows and hides the table of settings that differ.
    """

    changes = pyqtSignal(object)
    """A function that makes the new view from the present one."""
    adds, saves, reconnects = pyqtSignal(), pyqtSignal(), pyqtSignal()
    pans = pyqtSignal(bool)

    def __init__(self, view: View, differs: QAction):
        super().__init__("tools")
        self._view = view
        self.setObjectName("tools")
        self.setMovable(False)
        self._add_axes()
        self._add_zoom()
        self.addSeparator()
        self._add_switch("Dark", "", "dark")
        self.addAction(differs)
        self.addSeparator()
        self._add_button("Add…", "", self.adds.emit, "Ctrl+O")
        self._add_button("Save…", "", self.saves.emit, "Ctrl+S")
        self.reconnect_action = self._add_button("Reconnect", "", self.reconnects.emit, "F5")
        self.reconnect_action.setVisible(False)

    def _add_axes(self) -> None:
        self.addWidget(QLabel(f" {self._say('x axis')} "))
        self.x_box = QComboBox()
        for name in X_AXES:
            self.x_box.addItem(self._say(name), name)
        self.x_box.setCurrentIndex(X_AXES.index(self._view.x))
        self.x_box.currentIndexChanged.connect(
            lambda index: self.changes.emit(lambda view: replace(without_zoom(view), x=X_AXES[index]))
        )
        self.addWidget(self.x_box)
        self.log_action = self._add_switch("Log", "The y axis is logarithmic.", "log_y")
        self.addWidget(QLabel(f"  {self._say('Smoothing')} "))
        self._add_smoothing()
        self._add_switch("Raw", "Show the measured curves behind the smoothed ones.", "raw")
        self._add_switch("Marks", "Mark restarts, checkpoints and values that are not finite.", "marks")
        self._add_switch("Outliers", "The y axis reaches to the farthest value, not only to 98 of 100 values.",
                         "outliers")  # fmt: skip

    def _add_smoothing(self) -> None:
        self.smoothing = QSlider(Qt.Horizontal)
        self.smoothing.setRange(0, len(_SMOOTHINGS) - 1)
        self.smoothing.setFixedWidth(130)
        self.smoothing.setToolTip(self._say("Weight of the past in each point: exponential moving average."))
        self.smoothing.setValue(_nearest_smoothing(self._view.smoothing))
        self.smoothing_label = QLabel(self._smoothing_text(self._view.smoothing))
        widest = max((self._smoothing_text(weight) for weight in (None, 0.999)), key=len)
        self.smoothing_label.setFixedWidth(self.smoothing_label.fontMetrics().horizontalAdvance(widest) + 4)
        self.smoothing.valueChanged.connect(self._smooth)
        self.addWidget(self.smoothing)
        self.addWidget(self.smoothing_label)

    def _add_zoom(self) -> None:
        self.addSeparator()
        self._add_button("All", "Show everything, without zoom.", lambda: self.changes.emit(without_zoom), "Home")
        self.back_action = self._add_button(
            "All panels", "Show all panels again, as another double click does.",
            lambda: self.changes.emit(lambda view: replace(view, alone="")), "Esc",
        )  # fmt: skip
        self.back_action.setVisible(False)
        pan = self._add_button(
            "Pan", "Drag to move instead of to zoom. The right mouse button always moves.", lambda: None
        )
        pan.setCheckable(True)
        pan.toggled.connect(self.pans)

    def _add_button(self, text: str, tip: str, action: Callable, keys: str = "") -> QAction:
        button = self.addAction(self._say(text))
        button.setToolTip(self._say(tip or text) + (f" ({keys})" if keys else ""))
        button.triggered.connect(lambda _checked: action())
        if keys:
            button.setShortcut(keys)
        return button

    def _add_switch(self, text: str, tip: str, name: str) -> QAction:
        """A button that turns a field of the view on and off."""
        button = self._add_button(text, tip, lambda: None)
        button.setCheckable(True)
        button.setChecked(getattr(self._view, name))
        # A zoom along y was chosen for the axis as it was.
        zoom = {"y_ranges": ()} if name in ("log_y", "outliers") else {}
        button.toggled.connect(lambda on: self.changes.emit(lambda view: replace(view, **{name: on}, **zoom)))
        return button

    def _smooth(self, index: int) -> None:
        self.smoothing_label.setText(self._smoothing_text(_SMOOTHINGS[index]))
        self.changes.emit(lambda view: replace(view, smoothing=_SMOOTHINGS[index]))

    def _smoothing_text(self, weight: float | None) -> str:
        return f" {self._say('auto') if weight is None else f'{weight:g}'} "

    def _say(self, text: str) -> str:
        return translate(text, self._view.language)


def _nearest_smoothing(weight: float | None) -> int:
    """The slider's position nearest to a weight."""
    if weight is None:
        return 0
    return 1 + min(range(len(WEIGHTS)), key=lambda index: abs(WEIGHTS[index] - weight))

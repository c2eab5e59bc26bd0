"""The desktop window."""

import argparse
import gc
import html
import logging
import math
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from PyQt5.QtCore import QByteArray, QObject, QSettings, QSize, Qt, QTimer, pyqtSignal
from PyQt5.QtGui import QColor, QIcon, QPainter, QPalette, QPixmap
from PyQt5.QtWidgets import (
    QAbstractItemView,
    QAction,
    QApplication,
    QComboBox,
    QDockWidget,
    QFileDialog,
    QInputDialog,
    QLabel,
    QLineEdit,
    QListWidget,
    QListWidgetItem,
    QMainWindow,
    QMessageBox,
    QSlider,
    QTableWidget,
    QTableWidgetItem,
    QToolBar,
    QTreeWidget,
    QTreeWidgetItem,
    QVBoxLayout,
    QWidget,
)

from runs.history import Snapshot
from utils.text import plain
from viewer.colours import look, on_paper
from viewer.curves import WEIGHTS
from viewer.desktop.canvas import Canvas, Draughtsman, Picture, paint_stroke
from viewer.desktop.qt import open_application
from viewer.export import save
from viewer.panels import (
    X_AXES,
    ShownRun,
    View,
    available,
    chinese_font,
    choose,
    duration,
    left_out_of,
    prepare_matplotlib,
    theme_of,
    without_zoom,
)
from viewer.sources.addresses import RunAddress
from viewer.sources.labels import in_order, labels
from viewer.sources.run import Run
from viewer.sources.source import RunSource, open_sources
from viewer.state import State, differences, state_of
from viewer.text import translate

logger = logging.getLogger(__name__)

_COLUMNS = ("run", "state", "step", "loss", "validation", "rate", "time left", "where")
_SMOOTHINGS = (None, *WEIGHTS)
"""Of the slider. None: by the length of each curve."""
_MOST_COLUMN_WIDTH = 340
_TEXT_COLUMNS = {_COLUMNS.index(name) for name in ("run", "state", "where")}
_STATE_COLOURS = {"running": "#10b981", "stalled": "#f59e0b", "no connection": "#e11d48"}


class Questions(QObject):
    """Brings what a host asks from its thread before the user, and the answer back."""

    asked = pyqtSignal(str, tuple, object)

    def __init__(self):
        super().__init__()
        self._one_at_a_time = threading.Lock()
        self._closed = threading.Event()

    def confirm(self, name: str, key_type: str, fingerprint: str) -> bool:
        return bool(self._ask("confirm", (name, key_type, fingerprint)))

    def password(self, prompt: str) -> str | None:
        return self._ask("password", (prompt,)) or None

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """Nobody answers any more."""
        self._closed.set()

    def _ask(self, kind: str, values: tuple) -> object:
        with self._one_at_a_time:
            answer: queue.Queue = queue.Queue(1)
            self.asked.emit(kind, values, answer)
            while not self._closed.is_set():
                with suppress(queue.Empty):
                    return answer.get(timeout=0.2)
        return None


class Window(QMainWindow):
    """
    Args:
        view: how it opens.
        open_more: addresses -> sources, not started yet.
        settings: where the layout is remembered.
    """

    changed = pyqtSignal()

    def __init__(self, view: View, open_more: Callable[..., list[RunSource]], settings: QSettings):
        super().__init__()
        self._view, self._open_more, self._settings = view, open_more, settings
        self._sources: list[RunSource] = []
        self._hidden: set[tuple] = set()
        self._looks: dict[tuple, tuple[str, str]] = {}
        """Colour and mark of each run."""
        self._sorted_by: tuple[int, bool] | None = None
        """A column of the header, and whether its values fall; None: as the runs were named."""
        self._drawn_versions: object = None
        self._rests_until = 0.0
        self._chosen: set[str] = set(view.panels) - {"all"}
        self._table_of_differences: object = None
        self._header_rows: list[tuple] = []
        self._header_height = 60
        self.questions = Questions()
        self.questions.asked.connect(self._answer)
        self.draughtsman = Draughtsman()
        self.draughtsman.drawn.connect(self._show_picture)
        self.draughtsman.done.connect(lambda text: self.statusBar().showMessage(text, 15000))
        self.canvas = Canvas()
        self.canvas.set_view(view)
        self.canvas.zoomed.connect(self._set_view)
        self.canvas.resized.connect(self._redraw)
        self._build()
        self._soon = QTimer(self, singleShot=True, interval=100)
        self._soon.timeout.connect(self.refresh)
        # Through the event loop: sources call from threads of their own.
        self.changed.connect(self._soon_if_idle)
        self._clock = QTimer(self, interval=1000)
        self._clock.timeout.connect(self.refresh)
        self._clock.start()

    def _say(self, text: str) -> str:
        return translate(text, self._view.language)

    def open(self, addresses: list[RunAddress]) -> None:
        """Show more runs."""
        known = {source.target: source for source in self._sources}
        new = []
        for address in addresses:
            if address.target in known:
                known[address.target].add(address.path)
            else:
                new.append(address)
        sources = self._open_more(new, on_change=self.changed.emit, questions=self.questions)
        self._sources += sources
        for source in sources:
            source.start()

    @property
    def runs(self) -> list[Run]:
        return [run for source in self._sources for run in source.runs]

    def _build(self) -> None:
        self.setWindowTitle("resplot")
        self.resize(1300, 850)
        self.header = QTreeWidget()
        self.header.setObjectName("runs")
        self.header.setRootIsDecorated(False)
        self.header.setUniformRowHeights(True)
        self.header.setColumnCount(len(_COLUMNS))
        self.header.setHeaderLabels([self._say(name) for name in _COLUMNS])
        self.header.setSelectionMode(QAbstractItemView.NoSelection)
        self.header.setFocusPolicy(Qt.NoFocus)
        self.header.setTextElideMode(Qt.ElideMiddle)
        for column in range(len(_COLUMNS)):
            self.header.resizeColumnToContents(column)
        self.header.header().setSectionsClickable(True)
        self.header.header().sectionClicked.connect(self._sort)
        self.header.header().setToolTip(self._say("Click to sort: rising, falling, as the runs were named."))
        self.header.itemChanged.connect(self._toggle_run)
        self.header.itemDoubleClicked.connect(self._show_only)
        middle = QWidget()
        box = QVBoxLayout(middle)
        box.setContentsMargins(0, 0, 0, 0)
        box.setSpacing(0)
        box.addWidget(self.header)
        box.addWidget(self.canvas, 1)
        self.setCentralWidget(middle)
        self.panel_list = QListWidget()
        self.panel_list.itemChanged.connect(self._choose_panels)
        self._dock("Panels", self.panel_list, Qt.LeftDockWidgetArea)
        self.difference_table = QTableWidget()
        self.difference_table.setEditTriggers(QAbstractItemView.NoEditTriggers)
        self.difference_table.verticalHeader().hide()
        self.difference_dock = self._dock("What differs", self.difference_table, Qt.BottomDockWidgetArea)
        self.difference_dock.hide()
        self.difference_dock.visibilityChanged.connect(lambda _: self._show_differences())
        self._build_toolbar()
        self.statusBar().showMessage(
            self._say("Drag to zoom, wheel to zoom along x (with Shift: along y), right button to move, double-click "
                      "a panel to enlarge it."), 20000)  # fmt: skip
        self._put_on_theme()

    def _dock(self, title: str, widget: QWidget, area: Qt.DockWidgetArea) -> QDockWidget:
        dock = QDockWidget(self._say(title))
        dock.setObjectName(title)
        dock.setWidget(widget)
        self.addDockWidget(area, dock)
        return dock

    def _build_toolbar(self) -> None:
        bar = QToolBar("tools")
        bar.setObjectName("tools")
        bar.setMovable(False)
        self.addToolBar(bar)
        bar.addWidget(QLabel(f" {self._say('x axis')} "))
        self.x_box = QComboBox()
        for name in X_AXES:
            self.x_box.addItem(self._say(name), name)
        self.x_box.setCurrentIndex(X_AXES.index(self._view.x))
        self.x_box.currentIndexChanged.connect(
            lambda index: self._set_view(replace(without_zoom(self._view), x=X_AXES[index]))
        )
        bar.addWidget(self.x_box)
        self.log_action = self._switch(bar, "Log", "The y axis is logarithmic.", "log_y")
        bar.addWidget(QLabel(f"  {self._say('Smoothing')} "))
        self.smoothing = QSlider(Qt.Horizontal)
        self.smoothing.setRange(0, len(_SMOOTHINGS) - 1)
        self.smoothing.setFixedWidth(130)
        self.smoothing.setToolTip(self._say("How much of the past a point holds: exponential moving average."))
        self.smoothing.setValue(_nearest_smoothing(self._view.smoothing))
        self.smoothing_label = QLabel(self._smoothing_text(self._view.smoothing))
        widest = max((self._smoothing_text(weight) for weight in (None, 0.999)), key=len)
        self.smoothing_label.setFixedWidth(self.smoothing_label.fontMetrics().horizontalAdvance(widest) + 4)
        self.smoothing.valueChanged.connect(self._smooth)
        bar.addWidget(self.smoothing)
        bar.addWidget(self.smoothing_label)
        self._switch(bar, "Raw", "Behind smoothed curves, the measured ones stay visible.", "raw")
        self._switch(bar, "Marks", "Restarts, checkpoints and values that are not finite are marked.", "marks")
        self._switch(bar, "Outliers", "The y axis reaches to the farthest value, not only to where 98 of 100 are.",
                     "outliers")  # fmt: skip
        bar.addSeparator()
        self._button(bar, "All", "Everything is shown: no zoom.", self._zoom_out, "Home")
        self.back_action = self._button(
            bar, "All panels", "All panels again, as after another double click.", self._show_all_panels, "Esc"
        )
        self.back_action.setVisible(False)
        pan = self._button(
            bar, "Pan", "Drag to move instead of to zoom. The right mouse button always moves.", lambda: None
        )
        pan.setCheckable(True)
        pan.toggled.connect(lambda on: setattr(self.canvas, "pans", on))
        bar.addSeparator()
        self._switch(bar, "Dark", "", "dark")
        differs = self.difference_dock.toggleViewAction()
        bar.addAction(differs)
        bar.addSeparator()
        self._button(bar, "Add…", "", self._add, "Ctrl+O")
        self._button(bar, "Save…", "", self._save, "Ctrl+S")
        self.reconnect_action = self._button(bar, "Reconnect", "", self._reconnect, "F5")
        self.reconnect_action.setVisible(False)

    def _button(self, bar: QToolBar, text: str, tip: str, action: Callable, keys: str = "") -> QAction:
        button = bar.addAction(self._say(text))
        button.setToolTip(self._say(tip or text) + (f" ({keys})" if keys else ""))
        button.triggered.connect(lambda _checked: action())
        if keys:
            button.setShortcut(keys)
        return button

    def _switch(self, bar: QToolBar, text: str, tip: str, name: str) -> QAction:
        """A button that turns a yes-or-no of the view on and off."""
        button = self._button(bar, text, tip, lambda: None)
        button.setCheckable(True)
        button.setChecked(getattr(self._view, name))
        button.toggled.connect(lambda on: self._set_view(replace(self._without_y_zoom(name), **{name: on})))
        return button

    def _reconnect(self) -> None:
        for source in self._sources:
            source.retry()

    def _show_all_panels(self) -> None:
        self._set_view(replace(self._view, alone=""))

    def _smoothing_text(self, weight: float | None) -> str:
        return f" {self._say('auto') if weight is None else f'{weight:g}'} "

    def _zoom_out(self) -> None:
        self._set_view(without_zoom(self._view))

    def _without_y_zoom(self, name: str) -> View:
        return replace(self._view, y_ranges=()) if name in ("log_y", "outliers") else self._view

    def _smooth(self, index: int) -> None:
        self.smoothing_label.setText(self._smoothing_text(_SMOOTHINGS[index]))
        self._set_view(replace(self._view, smoothing=_SMOOTHINGS[index]))

    def _set_view(self, view: View) -> None:
        recoloured = view.dark != self._view.dark
        self._view = view
        self.canvas.set_view(view)
        self.back_action.setVisible(bool(view.alone))
        if recoloured:
            self._put_on_theme()
            self.refresh()
        self._redraw()

    def _put_on_theme(self) -> None:
        theme = theme_of(self._view)
        palette = QPalette()
        if self._view.dark:
            paper, ink = QColor(theme.paper), QColor(theme.ink)
            raised = QColor(theme.grid)
            for role in (QPalette.Window, QPalette.Base, QPalette.AlternateBase, QPalette.ToolTipBase):
                palette.setColor(role, paper)
            for role in (QPalette.WindowText, QPalette.Text, QPalette.ButtonText, QPalette.ToolTipText):
                palette.setColor(role, ink)
            palette.setColor(QPalette.Button, raised)
            palette.setColor(QPalette.Highlight, QColor("#3b82f6"))
            palette.setColor(QPalette.HighlightedText, QColor("#ffffff"))
            for role in (QPalette.Text, QPalette.ButtonText, QPalette.WindowText):
                palette.setColor(QPalette.Disabled, role, QColor(theme.faint))
        QApplication.instance().setPalette(palette)
        # The style's own boxes cannot be seen on dark paper.
        self.setStyleSheet(
            f"QAbstractItemView::indicator {{ width: 11px; height: 11px; border: 1px solid {theme.faint}; }}"
            "QAbstractItemView::indicator:checked { background: #3b82f6; border-color: #3b82f6; }"
        )

    def _soon_if_idle(self) -> None:
        if not self._soon.isActive():
            self._soon.start()

    def refresh(self) -> None:
        """Bring header, lists and, if there is something new, the picture up to date."""
        runs = self.runs
        names = labels(runs)
        for run in runs:
            self._look(run)
        snapshots = [run.history.snapshot() for run in runs]
        self._show_header(runs, names, snapshots)
        self._show_panel_list(snapshots)
        self._show_differences()
        problems = [f"{source.name}: {source.problem}" for source in self._sources if source.problem]
        self.reconnect_action.setVisible(bool(problems))
        if problems:
            self.statusBar().showMessage("   ".join(problems), 3000)
        versions = [(self._key(run), snapshot.version) for run, snapshot in zip(runs, snapshots)]
        if versions != self._drawn_versions and time.monotonic() >= self._rests_until:
            self._drawn_versions = versions
            self._redraw()

    @staticmethod
    def _key(run: Run) -> tuple:
        return (run.target, run.path)

    def _look(self, run: Run) -> tuple[str, str]:
        """A run keeps its colour and its mark as long as the window is open."""
        return self._looks.setdefault(self._key(run), look(len(self._looks)))

    def _show_header(self, runs: list[Run], names: list[str], snapshots: list) -> None:
        """Only what has changed: with many runs, Qt would spend its time on this."""
        now, language = time.time(), self._view.language
        states = [state_of(run, snapshot, now, language) for run, snapshot in zip(runs, snapshots)]
        rows = [
            (self._key(run), *self._header_texts(run, name, state),
             self._key(run) in self._hidden, self._left_out(run, snapshot), self._view.dark)
            for run, name, snapshot, state in zip(runs, names, snapshots, states)
        ]  # fmt: skip
        rows = self._in_order(rows, names, states)
        before, self._header_rows = self._header_rows, rows
        if rows != before:
            self._fill_header(rows, before)
            self._title(names, snapshots)
        bar = self.header.horizontalScrollBar()
        # It would cover the last row.
        self.header.setFixedHeight(self._header_height + (bar.sizeHint().height() if bar.maximum() > 0 else 0))

    def _fill_header(self, rows: list[tuple], before: list[tuple]) -> None:
        self.header.blockSignals(True)
        while self.header.topLevelItemCount() > len(rows):
            self.header.takeTopLevelItem(self.header.topLevelItemCount() - 1)
        for number, row in enumerate(rows):
            item = self.header.topLevelItem(number)
            if item is None:
                item = QTreeWidgetItem(self.header)
                item.setFlags(Qt.ItemIsEnabled | Qt.ItemIsUserCheckable)
            if number >= len(before) or row != before[number]:
                self._fill(item, row, before[number] if number < len(before) else (None,) * len(row))
        if len(rows) != len(before):
            shown = min(max(len(rows), 1), 8)
            height = self.header.sizeHintForRow(0) if rows else 20
            self._header_height = self.header.header().sizeHint().height() + shown * max(height, 18) + 6
        self.header.blockSignals(False)

    def _in_order(self, rows: list[tuple], names: list[str], states: list[State]) -> list[tuple]:
        """Rows by the column that was clicked; those without a value come last."""
        if self._sorted_by is None:
            return rows
        column, falls = self._sorted_by

        def value(number: int) -> object:
            state = states[number]
            found = (
                None, None, state.step, state.loss, state.valid_loss, state.tokens_per_sec, state.seconds_left, None
            )[column]  # fmt: skip
            if column in _TEXT_COLUMNS:
                return in_order(rows[number][1][column])
            return None if found is None or math.isnan(found) else found

        values = {number: value(number) for number in range(len(rows))}
        having = sorted((n for n in values if values[n] is not None), key=values.get, reverse=falls)
        return [rows[n] for n in [*having, *(n for n in values if values[n] is None)]]

    def _sort(self, column: int) -> None:
        """Rising, then falling, then not at all."""
        before = self._sorted_by
        self._sorted_by = {(column, False): (column, True), (column, True): None}.get(before, (column, False))
        self._show_order()
        self.refresh()

    def _show_order(self) -> None:
        self.header.header().setSortIndicatorShown(self._sorted_by is not None)
        if self._sorted_by is not None:
            column, falls = self._sorted_by
            self.header.header().setSortIndicator(column, Qt.DescendingOrder if falls else Qt.AscendingOrder)

    def _left_out(self, run: Run, snapshot: Snapshot) -> str:
        """What of a run is not shown: the picture has room for less."""
        found = left_out_of(snapshot, self._view.language)
        text = f"{self._say('left out')}: {'; '.join(found)}" if found else ""
        if run.health.config_problem:
            text += ("\n" if text else "") + self._say("its settings cannot be read: {}").format(
                run.health.config_problem
            )
        return text

    def _header_texts(self, run: Run, name: str, state: State) -> tuple[tuple[str, ...], str]:
        """What stands in the columns, and the colour of the state."""
        of = f" / {state.max_iters:,}" if state.max_iters is not None else ""
        rate = f"{state.tokens_per_sec:,.0f} tokens/s" if math.isfinite(state.tokens_per_sec) else ""
        where = f"{run.target.host}:{run.path}" if run.target else run.path
        texts = (
            name, self._say(state.kind) + (f": {state.detail}" if state.detail else ""),
            f"{state.step:,}{of}" if state.step is not None else "", _figure(state.loss), _figure(state.valid_loss),
            rate, duration(state.seconds_left) if math.isfinite(state.seconds_left) else "", plain(where),
        )  # fmt: skip
        return texts, _STATE_COLOURS.get(state.kind, theme_of(self._view).faint)

    def _fill(self, item: QTreeWidgetItem, row: tuple, before: tuple) -> None:
        key, texts, colour, hidden, left_out, dark = row
        if (key, dark) != (before[0], before[5]):
            shown, mark = self._looks[key]
            item.setData(0, Qt.UserRole, key)
            item.setIcon(0, _stroke(on_paper(shown, dark), mark))
        for column, text in enumerate(texts):
            if before[1] is None or text != before[1][column]:
                item.setText(column, text)
                self._widen(column, text)
        is_cut = self._needed_width(0, texts[0]) > self.header.columnWidth(0)
        tip = "\n".join(filter(None, [texts[0] if is_cut else "", left_out]))
        item.setToolTip(0, _tip(tip) if tip else "")
        item.setToolTip(1, _tip(texts[1]))
        item.setToolTip(len(texts) - 1, _tip(texts[-1]))
        if colour != before[2]:
            item.setForeground(1, QColor(colour))
        if hidden != before[3]:
            item.setCheckState(0, Qt.Unchecked if hidden else Qt.Checked)

    def _needed_width(self, column: int, text: str) -> int:
        return self.header.fontMetrics().horizontalAdvance(text) + (64 if column == 0 else 18)

    def _widen(self, column: int, text: str) -> None:
        """Within bounds: a long name would push all figures out of the window. The last column has what is left."""
        width = min(self._needed_width(column, text), _MOST_COLUMN_WIDTH)
        if width > self.header.columnWidth(column) and column < len(_COLUMNS) - 1:
            self.header.setColumnWidth(column, width)

    def _title(self, names: list[str], snapshots: list) -> None:
        if len(names) == 1 and "train" in snapshots[0].tables:
            step = int(snapshots[0].tables["train"]["step"][-1])
            self.setWindowTitle(f"{names[0]} · {self._say('step')} {step:,} · resplot")
        else:
            self.setWindowTitle("resplot")

    def _toggle_run(self, item: QTreeWidgetItem, column: int) -> None:
        key = item.data(0, Qt.UserRole)
        if column == 0 and (item.checkState(0) == Qt.Unchecked) != (key in self._hidden):
            self._hidden ^= {key}
            self._show_differences()
            self._redraw()

    def _show_only(self, item: QTreeWidgetItem, _column: int) -> None:
        """The run alone; once more: all."""
        key, keys = item.data(0, Qt.UserRole), {self._key(run) for run in self.runs}
        others = keys - {key}
        self._hidden = set() if self._hidden == others and others else others
        self.refresh()
        self._redraw()

    def _show_panel_list(self, snapshots: list) -> None:
        found = available(snapshots)
        keys = [panel.key for panel in found]
        shown = {panel.key for panel in choose(found, self._view)}
        listed = [self.panel_list.item(i).data(Qt.UserRole) for i in range(self.panel_list.count())]
        if keys == listed:
            return
        self.panel_list.blockSignals(True)
        self.panel_list.clear()
        for panel in found:
            item = QListWidgetItem(self._say(panel.title))
            item.setData(Qt.UserRole, panel.key)
            item.setToolTip(_tip(panel.key))
            item.setFlags(Qt.ItemIsEnabled | Qt.ItemIsUserCheckable)
            item.setCheckState(Qt.Checked if panel.key in shown else Qt.Unchecked)
            self.panel_list.addItem(item)
        self.panel_list.blockSignals(False)

    def _choose_panels(self, _item: QListWidgetItem) -> None:
        items = [self.panel_list.item(i) for i in range(self.panel_list.count())]
        listed = {item.data(Qt.UserRole) for item in items}
        checked = {item.data(Qt.UserRole) for item in items if item.checkState() == Qt.Checked}
        # What other runs have stays chosen for when they are shown again.
        self._chosen = (self._chosen - listed) | checked
        # Nothing chosen is not the same as the usual ones.
        self._set_view(replace(self._view, panels=tuple(self._chosen) or ("",), alone=""))

    def _show_differences(self) -> None:
        if not self.difference_dock.isVisible():
            return
        all_runs = self.runs
        shown = [(run, name) for run, name in zip(all_runs, labels(all_runs)) if self._key(run) not in self._hidden]
        rows = differences([run.health.config for run, _ in shown])
        unreadable = f" ({self._say('settings cannot be read')})"
        names = [name + unreadable * bool(run.health.config_problem) for run, name in shown]
        if (names, rows) == self._table_of_differences:
            return
        self._table_of_differences = (names, rows)
        # One run differs from nothing: all its settings are shown.
        self.difference_dock.setWindowTitle(self._say("Settings" if len(shown) == 1 else "What differs"))
        table = self.difference_table
        table.clear()
        table.setColumnCount(1 + len(names))
        table.setHorizontalHeaderLabels([self._say("setting"), *names])
        table.setRowCount(max(len(rows), 1))
        if not rows:
            has_none = not any(run.health.config for run, _ in shown)
            text = "No settings were found: config.yaml is missing." if has_none else (
                "All settings of these runs are the same."
            )  # fmt: skip
            table.setItem(0, 0, QTableWidgetItem(self._say(text)))
        for row, (key, values) in enumerate(rows):
            for column, text in enumerate([key, *values]):
                table.setItem(row, column, QTableWidgetItem(text))
        table.resizeColumnsToContents()

    def shown_runs(self) -> list[ShownRun]:
        runs = self.runs
        found = []
        for run, name in zip(runs, labels(runs)):
            if self._key(run) not in self._hidden:
                colour, mark = self._look(run)
                found.append(ShownRun(name, colour, run.history.snapshot(), mark))
        return found

    def _redraw(self) -> None:
        view = replace(self._view, legend=False)
        self.draughtsman.request(self.shown_runs(), view, self.canvas.size(), self.canvas.devicePixelRatioF())

    def _show_picture(self, picture: Picture) -> None:
        # Where drawing takes long, reading must come first.
        self._rests_until = time.monotonic() + min(3 * picture.seconds, 2.0)
        self.canvas.show_picture(picture)

    def _add(self) -> None:
        text, given = QInputDialog.getText(
            self, self._say("Add a run"), self._say("A run's directory, a folder of runs, or [user@]host:RUN")
        )
        if given and text.strip():
            try:
                self.open([RunAddress.parse(text.strip())])
            except ValueError as error:
                self.statusBar().showMessage(str(error), 15000)

    def _save(self) -> None:
        name, _ = QFileDialog.getSaveFileName(
            self, self._say("Save what is shown"), "curves.png", self._say("Pictures and tables (*.png *.svg *.csv)")
        )
        if name:
            self.save(Path(name))

    def save(self, path: Path) -> None:
        """Write what is shown; the status bar says what became of it."""
        path = path if path.suffix else path.with_suffix(".png")
        runs, view, size = self.shown_runs(), replace(self._view, legend=True), self.canvas.size()

        def action() -> str:
            try:
                save(path, runs, view, (size.width(), size.height()), scale=2.0)
            except (OSError, ValueError) as error:
                return self._say("cannot be saved: {}").format(error)
            return self._say("saved {}").format(path)

        self.draughtsman.later(action)

    def _answer(self, kind: str, values: tuple, answer: queue.Queue) -> None:
        if self.questions.closed:
            return
        if kind == "confirm":
            text = self._say(
                "{} is unknown. It shows the key\n\n{} {}\n\nIs that the host's fingerprint? Only then connect."
            ).format(*values)
            box = QMessageBox(QMessageBox.Warning, self._say("Unknown host"), text, parent=self)
            box.setStandardButtons(QMessageBox.Yes | QMessageBox.No)
            box.setDefaultButton(QMessageBox.No)
            box.setTextFormat(Qt.PlainText)
            answer.put(box.exec_() == QMessageBox.Yes)
        else:
            text, given = QInputDialog.getText(self, self._say("Login"), values[0], QLineEdit.Password)
            answer.put(text if given else None)

    def remember(self) -> None:
        """Leave the layout for the next time."""
        view = self._view
        for name, value in (
            ("geometry", self.saveGeometry()), ("docks", self.saveState()), ("x", view.x), ("log_y", view.log_y),
            ("smoothing", -1.0 if view.smoothing is None else view.smoothing), ("raw", view.raw),
            ("marks", view.marks), ("outliers", view.outliers),
            ("dark", view.dark), ("panels", ",".join(sorted(self._chosen))),
            ("sorted_by", -1 if self._sorted_by is None else self._sorted_by[0]),
            ("sort_falls", self._sorted_by is not None and self._sorted_by[1]),
        ):  # fmt: skip
            self._settings.setValue(name, value)
        self._settings.sync()

    def restore(self) -> None:
        """Take up the layout of the last time."""
        geometry, docks = self._settings.value("geometry"), self._settings.value("docks")
        # Of another type, it is from a damaged file.
        if isinstance(geometry, QByteArray):
            self.restoreGeometry(geometry)
        if isinstance(docks, QByteArray):
            self.restoreState(docks)
        column = _kept(self._settings, "sorted_by", -1)
        if 0 <= column < len(_COLUMNS):
            self._sorted_by = (column, _kept(self._settings, "sort_falls", False))
            self._show_order()

    def closeEvent(self, event) -> None:
        self.remember()
        self._clock.stop()
        self.questions.close()
        for source in self._sources:
            source.stop()
        self.draughtsman.stop()
        event.accept()


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def _tip(text: str) -> str:
    """Qt would take what looks like HTML for HTML, and load its pictures."""
    return f"<span>{html.escape(text)}</span>"


def _stroke(colour: str, mark: str) -> QIcon:
    """A piece of a run's curve."""
    picture = QPixmap(QSize(16, 16))
    picture.fill(Qt.transparent)
    painter = QPainter(picture)
    paint_stroke(painter, 0, 8, 16, colour, mark)
    painter.end()
    return QIcon(picture)


def _nearest_smoothing(weight: float | None) -> int:
    """The place on the slider."""
    if weight is None:
        return 0
    return 1 + min(range(len(WEIGHTS)), key=lambda index: abs(WEIGHTS[index] - weight))


def _kept(settings: QSettings, name: str, default):
    """What was remembered, if it is of the default's type."""
    found = settings.value(name, default)
    if isinstance(default, bool):
        return found in (True, "true")
    with suppress(TypeError, ValueError):
        found = type(default)(found)
        # NaN is not equal to itself.
        return found if found == found else default
    return default


def remembered_view(args: argparse.Namespace, settings: QSettings) -> View:
    """What the command line says, else what the window was like when it was closed."""

    def kept(name: str, default: object) -> object:
        return _kept(settings, name, default)

    x, panels = kept("x", "step"), args.panels if args.panels is not None else kept("panels", "")
    smoothing = kept("smoothing", -1.0) if args.smoothing is None else args.smoothing
    return View(
        panels=tuple(name.strip() for name in panels.split(",") if name.strip()),
        x=args.x or (x if x in X_AXES else "step"),
        log_y=kept("log_y", False) if args.log is None else args.log,
        smoothing=None if smoothing < 0 else min(smoothing, 0.999),
        raw=kept("raw", True), marks=kept("marks", True), outliers=kept("outliers", True),
        dark=kept("dark", False) if args.theme is None else args.theme == "dark",
        language=args.language,
    )  # fmt: skip


def show(args: argparse.Namespace) -> int:
    """Open the window and stay until it is closed."""
    app = open_application()
    app.setStyle("Fusion")
    settings = QSettings(QSettings.IniFormat, QSettings.UserScope, "zero2all", "resplot")
    if args.forget_layout:
        settings.clear()

    def open_more(addresses: list[RunAddress], **options) -> list[RunSource]:
        return open_sources(addresses, interval_s=args.interval, ssh_config=args.ssh_config, **options)

    window = Window(remembered_view(args, settings), open_more, settings)
    window.restore()
    window.show()
    prepare_matplotlib()
    if args.language == "zh" and chinese_font() is None:
        logger.warning("no font with Chinese characters is installed: install Noto Sans CJK, for instance")
    # Without it, PyQt ends the process after a mistake in a slot.
    sys.excepthook = lambda *problem: logger.error("this went wrong", exc_info=problem)
    # Threads that read and draw give way to Qt's often. Python's own search for garbage stops them all for 100 ms; the
    # draughtsman looks through what is new after each picture instead.
    sys.setswitchinterval(0.001)
    gc.collect()
    gc.freeze()
    gc.disable()
    signal.signal(signal.SIGINT, lambda *_: app.quit())
    app.aboutToQuit.connect(window.close)
    window.open(args.addresses)
    if not args.addresses:
        QTimer.singleShot(0, window._add)
    return app.exec_()

"""The table of runs above the panels."""

import time

from PyQt5.QtCore import QSize, Qt, pyqtSignal
from PyQt5.QtGui import QColor, QIcon, QPainter, QPixmap
from PyQt5.QtWidgets import QAbstractItemView, QTreeWidget, QTreeWidgetItem

from runs.history import Snapshot
from viewer.colours import look, on_paper
from viewer.desktop.strokes import paint_stroke
from viewer.desktop.tips import tip
from viewer.sources.run import Run
from viewer.state import state_of
from viewer.table import COLUMNS, STATE_COLOURS, Sorting, left_out_text, next_sorting, order_of, texts_of
from viewer.text import translate
from viewer.view import View, theme_of

_MOST_COLUMN_WIDTH = 340


def key_of(run: Run) -> tuple:
    """What identifies a run while the window is open."""
    return (run.target, run.path)


class RunTable(QTreeWidget):
    """One row for each run. Its box hides the run, a double click shows it alone, a click on the head of a column
    sorts."""

    hid = pyqtSignal()
    """The set of hidden runs has changed."""
    reordered = pyqtSignal()
    """Another order was asked for."""

    def __init__(self, language: str):
        super().__init__()
        self.hidden: set[tuple] = set()
        """Keys of the hidden runs."""
        self.sorted_by: Sorting | None = None
        self._looks: dict[tuple, tuple[str, str]] = {}
        """Colour and mark of each run."""
        self._rows: list[tuple] = []
        self._least_height = 60
        self.setObjectName("runs")
        self.setRootIsDecorated(False)
        self.setUniformRowHeights(True)
        self.setColumnCount(len(COLUMNS))
        self.setHeaderLabels([translate(name, language) for name in COLUMNS])
        self.setSelectionMode(QAbstractItemView.NoSelection)
        self.setFocusPolicy(Qt.NoFocus)
        self.setTextElideMode(Qt.ElideMiddle)
        for column in range(len(COLUMNS)):
            self.resizeColumnToContents(column)
        self.header().setSectionsClickable(True)
        self.header().sectionClicked.connect(self._sort)
        about_sorting = "Click to sort: rising, then falling, then as the runs were named."
        self.header().setToolTip(translate(about_sorting, language))
        self.itemChanged.connect(self._toggle)
        self.itemDoubleClicked.connect(self._show_only)

    def look(self, run: Run) -> tuple[str, str]:
        """Colour and mark of a run, which it keeps as long as the window is open."""
        return self._looks.setdefault(key_of(run), look(len(self._looks)))

    def is_hidden(self, run: Run) -> bool:
        return key_of(run) in self.hidden

    def show_runs(self, runs: list[Run], names: list[str], snapshots: list[Snapshot], view: View) -> bool:
        """Show the runs, and return whether anything has changed. Only changes are shown: with many runs, Qt would
        spend its time on the rest."""
        for run in runs:
            self.look(run)
        now, language = time.time(), view.language
        states = [state_of(run, snapshot, now, language) for run, snapshot in zip(runs, snapshots)]
        texts = [texts_of(run, name, state, language) for run, name, state in zip(runs, names, states)]
        faint = theme_of(view).faint
        rows = [
            (key_of(runs[n]), texts[n], STATE_COLOURS.get(states[n].kind, faint), self.is_hidden(runs[n]),
             left_out_text(runs[n], snapshots[n], language), view.dark)
            for n in order_of(texts, states, self.sorted_by)
        ]  # fmt: skip
        before, self._rows = self._rows, rows
        if rows != before:
            self._fill(rows, before)
        bar = self.horizontalScrollBar()
        # The bar would cover the last row.
        self.setFixedHeight(self._least_height + (bar.sizeHint().height() if bar.maximum() > 0 else 0))
        return rows != before

    def _fill(self, rows: list[tuple], before: list[tuple]) -> None:
        self.blockSignals(True)
        while self.topLevelItemCount() > len(rows):
            self.takeTopLevelItem(self.topLevelItemCount() - 1)
        for number, row in enumerate(rows):
            item = self.topLevelItem(number)
            if item is None:
                item = QTreeWidgetItem(self)
                item.setFlags(Qt.ItemIsEnabled | Qt.ItemIsUserCheckable)
            if number >= len(before) or row != before[number]:
                self._fill_row(item, row, before[number] if number < len(before) else (None,) * len(row))
        if len(rows) != len(before):
            shown = min(max(len(rows), 1), 8)
            height = self.sizeHintForRow(0) if rows else 20
            self._least_height = self.header().sizeHint().height() + shown * max(height, 18) + 6
        self.blockSignals(False)

    def _fill_row(self, item: QTreeWidgetItem, row: tuple, before: tuple) -> None:
        key, texts, colour, hidden, left_out, dark = row
        if (key, dark) != (before[0], before[5]):
            shown, mark = self._looks[key]
            item.setData(0, Qt.UserRole, key)
            item.setIcon(0, _stroke(on_paper(shown, dark), mark))
        for column, text in enumerate(texts):
            if before[1] is None or text != before[1][column]:
                item.setText(column, text)
                self._widen(column, text)
        is_cut = self._needed_width(0, texts[0]) > self.columnWidth(0)
        about_name = "\n".join(filter(None, [texts[0] if is_cut else "", left_out]))
        item.setToolTip(0, tip(about_name) if about_name else "")
        item.setToolTip(1, tip(texts[1]))
        item.setToolTip(len(texts) - 1, tip(texts[-1]))
        if colour != before[2]:
            item.setForeground(1, QColor(colour))
        if hidden != before[3]:
            item.setCheckState(0, Qt.Unchecked if hidden else Qt.Checked)

    def _needed_width(self, column: int, text: str) -> int:
        return self.fontMetrics().horizontalAdvance(text) + (64 if column == 0 else 18)

    def _widen(self, column: int, text: str) -> None:
        """Widen a column for a text, up to a limit: a long name would push all figures out of the window. The last
        column takes the remaining width."""
        width = min(self._needed_width(column, text), _MOST_COLUMN_WIDTH)
        if width > self.columnWidth(column) and column < len(COLUMNS) - 1:
            self.setColumnWidth(column, width)

    def sort_by(self, sorting: Sorting | None) -> None:
        self.sorted_by = sorting
        self.header().setSortIndicatorShown(sorting is not None)
        if sorting is not None:
            column, falls = sorting
            self.header().setSortIndicator(column, Qt.DescendingOrder if falls else Qt.AscendingOrder)

    def _sort(self, column: int) -> None:
        self.sort_by(next_sorting(self.sorted_by, column))
        self.reordered.emit()

    def _toggle(self, item: QTreeWidgetItem, column: int) -> None:
        key = item.data(0, Qt.UserRole)
        if column == 0 and (item.checkState(0) == Qt.Unchecked) != (key in self.hidden):
            self.hidden ^= {key}
            self.hid.emit()

    def _show_only(self, item: QTreeWidgetItem, _column: int) -> None:
        """Show the run alone; if it is alone, show all."""
        others = {row[0] for row in self._rows} - {item.data(0, Qt.UserRole)}
        self.hidden = set() if self.hidden == others and others else others
        self.hid.emit()


def _stroke(colour: str, mark: str) -> QIcon:
    """An icon with a piece of a run's curve."""
    picture = QPixmap(QSize(16, 16))
    picture.fill(Qt.transparent)
    painter = QPainter(picture)
    paint_stroke(painter, 0, 8, 16, colour, mark)
    painter.end()
    return QIcon(picture)

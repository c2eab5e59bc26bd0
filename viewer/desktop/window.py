"""The desktop window: puts its parts together, and asks for another picture when there is something new."""

import queue
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from PyQt5.QtCore import QByteArray, QSettings, Qt, QTimer, pyqtSignal
from PyQt5.QtWidgets import QDockWidget, QFileDialog, QInputDialog, QMainWindow, QVBoxLayout, QWidget

from viewer.desktop.canvas import Canvas
from viewer.desktop.draughtsman import Draughtsman, Picture
from viewer.desktop.questions import WindowQuestions, ask_user
from viewer.desktop.remembered import kept, remember_view
from viewer.desktop.run_table import RunTable, key_of
from viewer.desktop.side_lists import DifferenceTable, PanelList
from viewer.desktop.theme import put_on_theme
from viewer.desktop.toolbar import Tools
from viewer.drawing.export import save
from viewer.panels import available, choose
from viewer.sources.addresses import RunAddress
from viewer.sources.labels import labels
from viewer.sources.run import Run
from viewer.sources.source import RunSource
from viewer.table import COLUMNS
from viewer.text import translate
from viewer.view import ShownRun, View


class Window(QMainWindow):
    """The viewer's window.

    Args:
        view: the view with which the window opens.
        open_more: from addresses to sources that are not started yet.
        settings: remember the layout.
    """

    changed = pyqtSignal()
    """A source has something new."""

    def __init__(self, view: View, open_more: Callable[..., list[RunSource]], settings: QSettings):
        super().__init__()
        self._view, self._open_more, self._settings = view, open_more, settings
        self._sources: list[RunSource] = []
        self._drawn_versions: object = None
        self._rests_until = 0.0
        self._chosen: set[str] = set(view.panels) - {"all"}
        self.questions = WindowQuestions()
        self.questions.asked.connect(self._answer)
        self.draughtsman = Draughtsman()
        self.draughtsman.drawn.connect(self._show_picture)
        self.draughtsman.done.connect(lambda text: self.statusBar().showMessage(text, 15000))
        self._build()
        self._soon = QTimer(self, singleShot=True, interval=100)
        self._soon.timeout.connect(self.refresh)
        # The signal passes through the event loop: sources call from threads of their own.
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
        language = self._view.language
        self.setWindowTitle("resplot")
        self.resize(1300, 850)
        self.canvas = Canvas()
        self.canvas.set_view(self._view)
        self.canvas.zoomed.connect(self._set_view)
        self.canvas.resized.connect(self._redraw)
        self.header = RunTable(language)
        self.header.hid.connect(self._show_others)
        self.header.reordered.connect(self.refresh)
        middle = QWidget()
        box = QVBoxLayout(middle)
        box.setContentsMargins(0, 0, 0, 0)
        box.setSpacing(0)
        box.addWidget(self.header)
        box.addWidget(self.canvas, 1)
        self.setCentralWidget(middle)
        self.panel_list = PanelList(language)
        self.panel_list.chosen.connect(self._choose_panels)
        self._dock("Panels", self.panel_list, Qt.LeftDockWidgetArea)
        self.difference_table = DifferenceTable(language)
        self.difference_dock = self._dock("What differs", self.difference_table, Qt.BottomDockWidgetArea)
        self.difference_dock.hide()
        self.difference_dock.visibilityChanged.connect(lambda _: self._show_differences())
        self._build_tools()
        self.statusBar().showMessage(
            self._say("Drag to zoom, wheel to zoom along x (with Shift: along y), right button to move, double-click "
                      "a panel to enlarge it."), 20000)  # fmt: skip
        put_on_theme(self, self._view)

    def _dock(self, title: str, widget: QWidget, area: Qt.DockWidgetArea) -> QDockWidget:
        dock = QDockWidget(self._say(title))
        dock.setObjectName(title)
        dock.setWidget(widget)
        self.addDockWidget(area, dock)
        return dock

    def _build_tools(self) -> None:
        self.tools = Tools(self._view, self.difference_dock.toggleViewAction())
        self.addToolBar(self.tools)
        self.tools.changes.connect(lambda change: self._set_view(change(self._view)))
        self.tools.pans.connect(lambda on: setattr(self.canvas, "pans", on))
        self.tools.adds.connect(self.add)
        self.tools.saves.connect(self._save)
        self.tools.reconnects.connect(self._reconnect)

    def _reconnect(self) -> None:
        for source in self._sources:
            source.retry()

    def _set_view(self, view: View) -> None:
        recoloured = view.dark != self._view.dark
        self._view = view
        self.canvas.set_view(view)
        self.tools.back_action.setVisible(bool(view.alone))
        if recoloured:
            put_on_theme(self, view)
            self.refresh()
        self._redraw()

    def _soon_if_idle(self) -> None:
        if not self._soon.isActive():
            self._soon.start()

    def refresh(self) -> None:
        """Bring the table, the lists and, if there is something new, the picture up to date."""
        runs = self.runs
        names = labels(runs)
        snapshots = [run.history.snapshot() for run in runs]
        if self.header.show_runs(runs, names, snapshots, self._view):
            self._title(names, snapshots)
        panels = available(snapshots)
        self.panel_list.show_panels(panels, {panel.key for panel in choose(panels, self._view)})
        self._show_differences()
        problems = [f"{source.name}: {source.problem}" for source in self._sources if source.problem]
        self.tools.reconnect_action.setVisible(bool(problems))
        if problems:
            self.statusBar().showMessage("   ".join(problems), 3000)
        versions = [(key_of(run), snapshot.version) for run, snapshot in zip(runs, snapshots)]
        if versions != self._drawn_versions and time.monotonic() >= self._rests_until:
            self._drawn_versions = versions
            self._redraw()

    def _title(self, names: list[str], snapshots: list) -> None:
        if len(names) == 1 and "train" in snapshots[0].tables:
            step = int(snapshots[0].tables["train"]["step"][-1])
            self.setWindowTitle(f"{names[0]} · {self._say('step')} {step:,} · resplot")
        else:
            self.setWindowTitle("resplot")

    def _show_others(self) -> None:
        self.refresh()
        self._redraw()

    def _choose_panels(self, listed: set[str], checked: set[str]) -> None:
        # Panels of hidden runs stay chosen until these are shown again.
        self._chosen = (self._chosen - listed) | checked
        # A view without panels would show the usual ones.
        self._set_view(replace(self._view, panels=tuple(self._chosen) or ("",), alone=""))

    def _named_runs(self) -> list[tuple[Run, str]]:
        """The runs that are not hidden, with their names among all runs."""
        runs = self.runs
        return [(run, name) for run, name in zip(runs, labels(runs)) if not self.header.is_hidden(run)]

    def _show_differences(self) -> None:
        if self.difference_dock.isVisible():
            shown = self._named_runs()
            if self.difference_table.show_settings(shown):
                # A single run differs from none: all its settings are shown.
                self.difference_dock.setWindowTitle(self._say("Settings" if len(shown) == 1 else "What differs"))

    def shown_runs(self) -> list[ShownRun]:
        found = []
        for run, name in self._named_runs():
            colour, mark = self.header.look(run)
            found.append(ShownRun(name, colour, run.history.snapshot(), mark))
        return found

    def _redraw(self) -> None:
        view = replace(self._view, legend=False)
        self.draughtsman.request(self.shown_runs(), view, self.canvas.size(), self.canvas.devicePixelRatioF())

    def _show_picture(self, picture: Picture) -> None:
        # If drawing takes long, reading must come first.
        self._rests_until = time.monotonic() + min(3 * picture.seconds, 2.0)
        self.canvas.show_picture(picture)

    def add(self) -> None:
        """Ask for more runs."""
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
        """Write what is shown into a file; the status bar reports the result."""
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
        if not self.questions.closed:
            answer.put(ask_user(self, kind, values, self._view.language))

    def remember(self) -> None:
        """Remember the layout for the next time."""
        sorting = self.header.sorted_by
        for name, value in (
            ("geometry", self.saveGeometry()), ("docks", self.saveState()), ("panels", ",".join(sorted(self._chosen))),
            ("sorted_by", -1 if sorting is None else sorting[0]), ("sort_falls", sorting is not None and sorting[1]),
        ):  # fmt: skip
            self._settings.setValue(name, value)
        remember_view(self._view, self._settings)
        self._settings.sync()

    def restore(self) -> None:
        """Restore the layout of the last time."""
        geometry, docks = self._settings.value("geometry"), self._settings.value("docks")
        # A value of another type comes from a damaged file.
        if isinstance(geometry, QByteArray):
            self.restoreGeometry(geometry)
        if isinstance(docks, QByteArray):
            self.restoreState(docks)
        column = kept(self._settings, "sorted_by", -1)
        if 0 <= column < len(COLUMNS):
            self.header.sort_by((column, kept(self._settings, "sort_falls", False)))

    def closeEvent(self, event) -> None:
        self.remember()
        self._clock.stop()
        self.questions.close()
        for source in self._sources:
            source.stop()
        self.draughtsman.stop()
        event.accept()

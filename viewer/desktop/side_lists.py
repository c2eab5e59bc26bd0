"""The lists at the window's sides: panels, and settings that differ."""

from PyQt5.QtCore import Qt, pyqtSignal
from PyQt5.QtWidgets import QListWidget, QListWidgetItem, QTableWidget, QTableWidgetItem

from viewer.desktop.tips import tip
from viewer.panels import Panel
from viewer.sources.run import Run
from viewer.state import differences
from viewer.text import translate


class PanelList(QListWidget):
    """The panels that the runs have, each with a box."""

    chosen = pyqtSignal(set, set)
    """(keys of all listed panels, keys of the checked ones)."""

    def __init__(self, language: str):
        super().__init__()
        self._language = language
        self.itemChanged.connect(lambda _: self.chosen.emit(*self._keys()))

    def _keys(self) -> tuple[set[str], set[str]]:
        items = [self.item(number) for number in range(self.count())]
        listed = {item.data(Qt.UserRole) for item in items}
        return listed, {item.data(Qt.UserRole) for item in items if item.checkState() == Qt.Checked}

    def show_panels(self, panels: list[Panel], shown: set[str]) -> None:
        """List the panels, if they are others than before.

        Args:
            shown: keys of the panels to check.
        """
        if [panel.key for panel in panels] == [self.item(n).data(Qt.UserRole) for n in range(self.count())]:
            return
        self.blockSignals(True)
        self.clear()
        for panel in panels:
            item = QListWidgetItem(translate(panel.title, self._language))
            item.setData(Qt.UserRole, panel.key)
            item.setToolTip(tip(panel.key))
            item.setFlags(Qt.ItemIsEnabled | Qt.ItemIsUserCheckable)
            item.setCheckState(Qt.Checked if panel.key in shown else Qt.Unchecked)
            self.addItem(item)
        self.blockSignals(False)


class DifferenceTable(QTableWidget):
    """The settings that are not the same in all runs; for a single run, all its settings."""

    def __init__(self, language: str):
        super().__init__()
        self._language = language
        self._shown: object = None
        self.setEditTriggers(QTableWidget.NoEditTriggers)
        self.verticalHeader().hide()

    def show_settings(self, runs: list[tuple[Run, str]]) -> bool:
        """Show the settings if they have changed, and return whether they have.

        Args:
            runs: runs with their names.
        """
        rows = differences([run.health.config for run, _ in runs])
        unreadable = f" ({self._say('settings cannot be read')})"
        names = [name + unreadable * bool(run.health.config_problem) for run, name in runs]
        if (names, rows) == self._shown:
            return False
        self._shown = (names, rows)
        self.clear()
        self.setColumnCount(1 + len(names))
        self.setHorizontalHeaderLabels([self._say("setting"), *names])
        self.setRowCount(max(len(rows), 1))
        if not rows:
            has_none = not any(run.health.config for run, _ in runs)
            text = "No settings were found: config.yaml is missing." if has_none else (
                "All settings of these runs are the same."
            )  # fmt: skip
            self.setItem(0, 0, QTableWidgetItem(self._say(text)))
        for row, (key, values) in enumerate(rows):
            for column, text in enumerate([key, *values]):
                self.setItem(row, column, QTableWidgetItem(text))
        self.resizeColumnsToContents()
        return True

    def _say(self, text: str) -> str:
        return translate(text, self._language)

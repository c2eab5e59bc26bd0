"""Questions of a host at login: whether its key is right, and a password."""

import queue
import threading
from contextlib import suppress

from PyQt5.QtCore import QObject, Qt, pyqtSignal
from PyQt5.QtWidgets import QInputDialog, QLineEdit, QMessageBox, QWidget

from viewer.text import translate


class WindowQuestions(QObject):
    """Brings questions from a source's thread to the user, and the answers back."""

    asked = pyqtSignal(str, tuple, object)
    """(kind, values, queue for the answer)."""

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
        """Answer all questions with None from now on: nobody is there."""
        self._closed.set()

    def _ask(self, kind: str, values: tuple) -> object:
        with self._one_at_a_time:
            answer: queue.Queue = queue.Queue(1)
            self.asked.emit(kind, values, answer)
            while not self._closed.is_set():
                with suppress(queue.Empty):
                    return answer.get(timeout=0.2)
        return None


def ask_user(parent: QWidget, kind: str, values: tuple, language: str) -> bool | str | None:
    """The answer from a dialog; None if the user gives none.

    Args:
        kind: "confirm" or "password".
    """
    if kind == "confirm":
        text = translate(
            "{} is unknown. It shows the key\n\n{} {}\n\nIs that the host's fingerprint? Only then connect.", language
        ).format(*values)
        box = QMessageBox(QMessageBox.Warning, translate("Unknown host", language), text, parent=parent)
        box.setStandardButtons(QMessageBox.Yes | QMessageBox.No)
        box.setDefaultButton(QMessageBox.No)
        box.setTextFormat(Qt.PlainText)
        return box.exec_() == QMessageBox.Yes
    text, given = QInputDialog.getText(parent, translate("Login", language), values[0], QLineEdit.Password)
    return text if given else None

"""Colours of Qt's own widgets, light or dark as the paper of the panels."""

from PyQt5.QtGui import QColor, QPalette
from PyQt5.QtWidgets import QApplication, QWidget

from viewer.view import View, theme_of

_CHOSEN = "#3b82f6"


def put_on_theme(window: QWidget, view: View) -> None:
    theme = theme_of(view)
    palette = QPalette()
    if view.dark:
        paper, ink = QColor(theme.paper), QColor(theme.ink)
        raised = QColor(theme.grid)
        for role in (QPalette.Window, QPalette.Base, QPalette.AlternateBase, QPalette.ToolTipBase):
            palette.setColor(role, paper)
        for role in (QPalette.WindowText, QPalette.Text, QPalette.ButtonText, QPalette.ToolTipText):
            palette.setColor(role, ink)
        palette.setColor(QPalette.Button, raised)
        palette.setColor(QPalette.Highlight, QColor(_CHOSEN))
        palette.setColor(QPalette.HighlightedText, QColor("#ffffff"))
        for role in (QPalette.Text, QPalette.ButtonText, QPalette.WindowText):
            palette.setColor(QPalette.Disabled, role, QColor(theme.faint))
    QApplication.instance().setPalette(palette)
    # The boxes of Qt's style cannot be seen on dark paper.
    window.setStyleSheet(
        f"QAbstractItemView::indicator {{ width: 11px; height: 11px; border: 1px solid {theme.faint}; }}"
        f"QAbstractItemView::indicator:checked {{ background: {_CHOSEN}; border-color: {_CHOSEN}; }}"
    )

"""The window's process: Qt's application, threads, the end."""

import argparse
import gc
import logging
import signal
import sys

from PyQt5.QtCore import QSettings, QTimer

from viewer.desktop.qt import open_application
from viewer.desktop.remembered import remembered_view
from viewer.desktop.window import Window
from viewer.drawing.figure import chinese_font, prepare_matplotlib
from viewer.sources.addresses import RunAddress
from viewer.sources.source import RunSource, open_sources

logger = logging.getLogger(__name__)


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
    # Without a hook, PyQt ends the process after a mistake in a slot.
    sys.excepthook = lambda *problem: logger.error("this went wrong", exc_info=problem)
    # Threads that read and draw often give way to Qt's. Python's own search for garbage would stop all of them for 100
    # ms; the draughtsman searches new objects after each picture instead.
    sys.setswitchinterval(0.001)
    gc.collect()
    gc.freeze()
    gc.disable()
    signal.signal(signal.SIGINT, lambda *_: app.quit())
    app.aboutToQuit.connect(window.close)
    window.open(args.addresses)
    if not args.addresses:
        QTimer.singleShot(0, window.add)
    return app.exec_()

"""Starts Qt. If it cannot open a window, Qt by itself would end the process with SIGABRT and a page of messages."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PyQt5.QtWidgets import QApplication

WITHOUT_WINDOW = "--png FILE draws without a window"


def open_application() -> "QApplication":
    """The process's QApplication. If Qt gives up, print a sentence that says why, and end with exit code 2."""
    from PyQt5.QtCore import QtFatalMsg, qInstallMessageHandler
    from PyQt5.QtWidgets import QApplication

    if QApplication.instance():
        return QApplication.instance()
    said: list[str] = []

    def listen(kind: int, _context: object, message: str) -> None:
        said.append(message)
        if kind == QtFatalMsg:
            # When this function returns or raises, Qt aborts. No source is being read yet, so there is nothing else to
            # end.
            print(f"resplot: {why_no_window(said)}", file=sys.stderr, flush=True)
            os._exit(2)

    before = qInstallMessageHandler(listen)
    try:
        app = QApplication(["resplot"])
    finally:
        qInstallMessageHandler(before)
    for message in said:
        print(message, file=sys.stderr)
    return app


def why_no_window(said: Sequence[str]) -> str:
    """A sentence for the user.

    Args:
        said: messages of Qt before it gave up.
    """
    text = "\n".join(said)
    if "could not connect to display" in text or "Failed to create wl_display" in text:
        reason = "there is no display (over SSH: `ssh -X`)"
    elif match := re.search(r'Could not load the Qt platform plugin "([^"]+)"', text):
        reason = _missing_libraries(match[1]) or f"its plugin {match[1]!r} cannot be loaded"
    elif match := re.search(r'Could not find the Qt platform plugin "([^"]*)"', text):
        reason = f"it has no platform {match[1]!r} (QT_QPA_PLATFORM, QT_QPA_PLATFORM_PLUGIN_PATH)"
    else:
        reason = " ".join(text.split())[:300]
    return f"Qt cannot open a window: {reason}; {WITHOUT_WINDOW}"


def _missing_libraries(platform: str) -> str:
    """A text that names the system libraries which a platform's plugin lacks, and their packages; empty if it lacks
    none or that cannot be known."""
    from PyQt5.QtCore import QLibraryInfo

    plugin = os.path.join(QLibraryInfo.location(QLibraryInfo.PluginsPath), "platforms", f"libq{platform}.so")
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["ldd", plugin], capture_output=True, text=True, errors="replace", timeout=20)
        missing = lacking(done.stdout)
        if missing:
            are = "is" if len(missing) == 1 else "are"
            packages = " ".join(map(debian_package, missing))
            return f"{', '.join(missing)} {are} missing (on Debian and Ubuntu: apt install {packages})"
    return ""


def lacking(ldd: str) -> list[str]:
    """Names of the libraries that `ldd` did not find, from its output."""
    return sorted(set(re.findall(r"^\s*(\S+) => not found", ldd, re.MULTILINE)))


def debian_package(library: str) -> str:
    """Name of the package of a library by Debian's rule (Policy, 8.1): libfoo.so.4 is in libfoo4, libfoo1.so.4 in
    libfoo1-4."""
    name, _, version = library.lower().partition(".so.")
    version = version.partition(".")[0]
    return f"{name}{'-' if name[-1:].isdigit() else ''}{version}"

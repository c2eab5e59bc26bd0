"""The choices that the window remembers from one time to the next."""

import argparse
from contextlib import suppress

from PyQt5.QtCore import QSettings

from viewer.view import X_AXES, View


def kept(settings: QSettings, name: str, default):
    """The remembered value, if it is of the default's type; otherwise the default."""
    found = settings.value(name, default)
    if isinstance(default, bool):
        return found in (True, "true")
    with suppress(TypeError, ValueError):
        found = type(default)(found)
        # NaN is not equal to itself.
        return found if found == found else default
    return default


def remembered_view(args: argparse.Namespace, settings: QSettings) -> View:
    """The view of the command line; what that does not say is as it was when the window was closed."""
    x = kept(settings, "x", "step")
    panels = args.panels if args.panels is not None else kept(settings, "panels", "")
    smoothing = kept(settings, "smoothing", -1.0) if args.smoothing is None else args.smoothing
    return View(
        panels=tuple(name.strip() for name in panels.split(",") if name.strip()),
        x=args.x or (x if x in X_AXES else "step"),
        log_y=kept(settings, "log_y", False) if args.log is None else args.log,
        smoothing=None if smoothing < 0 else min(smoothing, 0.999),
        raw=kept(settings, "raw", True),
        marks=kept(settings, "marks", True),
        outliers=kept(settings, "outliers", True),
        dark=kept(settings, "dark", False) if args.theme is None else args.theme == "dark",
        language=args.language,
    )


def remember_view(view: View, settings: QSettings) -> None:
    """Remember all of a view but its panels and its zoom."""
    smoothing = -1.0 if view.smoothing is None else view.smoothing
    for name in ("x", "log_y", "raw", "marks", "outliers", "dark"):
        settings.setValue(name, getattr(view, name))
    settings.setValue("smoothing", smoothing)

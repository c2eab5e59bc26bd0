"""What is shown, and how: the state of a view, whatever draws it."""

from dataclasses import dataclass, replace

from runs.history import Snapshot

X_AXES = ("step", "tokens", "time", "clock")


@dataclass(frozen=True)
class ShownRun:
    label: str
    colour: str
    """Of colours.COLOURS; on dark paper it is drawn lighter."""
    snapshot: Snapshot
    mark: str = ""
    """Of colours.MARKS: stands on its curves."""


@dataclass(frozen=True)
class View:
    """What is shown, and how."""

    panels: tuple[str, ...] = ()
    """Keys; none: the usual ones; only "all": all."""
    x: str = "step"
    """One of X_AXES."""
    log_y: bool = False
    smoothing: float | None = 0.0
    """Weight of `curves.smooth`; None: by the length of each curve."""
    raw: bool = True
    """The measured curve behind a smoothed one."""
    marks: bool = True
    outliers: bool = True
    """The y axis reaches to them."""
    dark: bool = False
    language: str = "en"
    legend: bool = True
    """Names of the runs on top."""
    x_range: tuple[float, float] | None = None
    y_ranges: tuple[tuple[str, tuple[float, float]], ...] = ()
    """(panel, range)."""
    alone: str = ""
    """The key of the panel that has the whole picture for itself."""


def without_zoom(view: View) -> View:
    return replace(view, x_range=None, y_ranges=())


@dataclass(frozen=True)
class Theme:
    paper: str
    ink: str
    faint: str
    grid: str


_LIGHT = Theme("#ffffff", "#1f2937", "#6b7280", "#e5e7eb")
_DARK = Theme("#16181d", "#e5e7eb", "#9ca3af", "#2d3139")


def theme_of(view: View) -> Theme:
    return _DARK if view.dark else _LIGHT

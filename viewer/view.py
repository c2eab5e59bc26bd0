"""The state of a view: which runs and panels it shows, and how, whatever draws it."""

from dataclasses import dataclass, replace

from runs.history import Snapshot

X_AXES = ("step", "tokens", "time", "clock")


@dataclass(frozen=True)
class ShownRun:
    """A run as a view shows it."""

    label: str
    colour: str
    """One of colours.COLOURS; on dark paper it is drawn lighter."""
    snapshot: Snapshot
    mark: str = ""
    """One of colours.MARKS; it stands on the run's curves."""


@dataclass(frozen=True)
class View:
    """Choices of the user, all in one place."""

    panels: tuple[str, ...] = ()
    """Keys of the panels. Empty: the usual ones; only "all": all."""
    x: str = "step"
    """One of X_AXES."""
    log_y: bool = False
    smoothing: float | None = 0.0
    """Weight for `curves.smooth`. None: chosen by the length of each curve."""
    raw: bool = True
    """Whether the measured curve is shown behind a smoothed one."""
    marks: bool = True
    outliers: bool = True
    """Whether the y axis reaches to them."""
    dark: bool = False
    language: str = "en"
    legend: bool = True
    """Whether the names of the runs stand on top."""
    x_range: tuple[float, float] | None = None
    y_ranges: tuple[tuple[str, tuple[float, float]], ...] = ()
    """(key of a panel, its range)."""
    alone: str = ""
    """Key of the panel that has the whole picture to itself."""


def without_zoom(view: View) -> View:
    """The view with the ranges that show everything."""
    return replace(view, x_range=None, y_ranges=())


@dataclass(frozen=True)
class Theme:
    """Colours of everything but the curves."""

    paper: str
    ink: str
    faint: str
    grid: str


_LIGHT = Theme("#ffffff", "#1f2937", "#6b7280", "#e5e7eb")
_DARK = Theme("#16181d", "#e5e7eb", "#9ca3af", "#2d3139")


def theme_of(view: View) -> Theme:
    return _DARK if view.dark else _LIGHT

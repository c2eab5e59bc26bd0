"""Numbers and names as the card words them."""

import math
import time
from collections.abc import Iterable
from pathlib import Path

NOT_RECORDED = "not recorded"


def number(value: float | None) -> str:
    """A measured value with about four digits."""
    if value is None:
        return NOT_RECORDED
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        return f"{value:.3g}"
    return f"{value:,.0f}" if size >= 1e4 else f"{value:.4g}"


def amount(value: float, unit: str) -> str:
    """A large amount with its prefix: 2.51 PFLOP."""
    for size, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """45.2 s, 12.5 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole > 0 else "–"


def moment(seconds: float) -> str:
    """Date and time in UTC: a card may be read anywhere."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (OverflowError, OSError, ValueError):
        return "at no date"


def listed(words: Iterable[str]) -> str:
    """a; a and b; a, b and c."""
    found = list(words)
    return f"{', '.join(found[:-1])} and {found[-1]}" if len(found) > 1 else "".join(found)


def counted(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def short(path: Path | str) -> str:
    """A path without the home directory, relative to the working directory if it lies below."""
    found = Path(path)
    if found.is_absolute():
        for base, before in ((Path.cwd(), Path()), (_home(), Path("~"))):
            if base is not None and found.is_relative_to(base):
                return str(before / found.relative_to(base))
    return str(found)


def without_home(command: str) -> str:
    """A command in which paths below the home directory begin with `~`, which our commands expand."""
    home = _home()
    return command if home is None else command.replace(f"{home}/", "~/")


def _home() -> Path | None:
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home != home.parent else None


def cut(text: str, most: int) -> str:
    """The beginning of a text, and how much of it is left out."""
    return text if len(text) <= most else f"{text[:most]} [... {len(text) - most:,} more characters]"


def on_a_line(text: str) -> str:
    """A text as one line without characters that nobody sees or that turn the direction of writing, and without the
    home directory, which sentences of other rooms may name."""
    line = without_home(" ".join(text.split()))
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def on_lines(text: str) -> str:
    """The same for a text whose lines, spaces and home directories stay; control characters become their pictures."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else chr(0x2400 + ord(c)) if ord(c) < 32 else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )

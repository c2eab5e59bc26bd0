"""Arguments that several commands share. Needs no torch."""

from collections.abc import Iterable
from pathlib import Path

from utils.paths import expand

NO_ADAPTER = "none"
"""Name by which users mean the model without an adapter."""


def parse_adapters(texts: Iterable[str]) -> dict[str, Path]:
    """Name -> path of the adapters that flags name as NAME=PATH or as PATH, whose last part is its name then.

    Raises:
        ValueError: a name is impossible, or given twice.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        if not equals or "/" in name:
            # A folder, which may have the sign in its own name.
            name, rest = "", text
        elif name.split() != [name]:
            raise ValueError(f"--adapter {text}: a name has no blanks: write NAME=DIR, or DIR")
        if not rest:
            raise ValueError(f"--adapter {text}: a folder is missing: write NAME=DIR, or DIR")
        path = Path(expand(rest))
        name = name or name_of(path)
        require_new(name, found)
        found[name] = path
    return found


def name_of(path: Path) -> str:
    """Name of an adapter that nobody has named: the last part of its path."""
    return path.absolute().name


def require_new(name: str, names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: an adapter's name is among these, or means no adapter.
    """
    if name == NO_ADAPTER:
        raise ValueError(f"no adapter can be called {name}, which means the model without one: give it as NAME=DIR")
    if name in names:
        raise ValueError(f"two adapters are called {name}: give one as NAME=DIR, with another name")

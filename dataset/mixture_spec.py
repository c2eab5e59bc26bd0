"""What a user says of a mixture, in place of a data directory: on the command line or in a file.

    --data_dir "data/web:0.6,data/code:0.3,data/wiki:0.1"
    --data_dir mixture.yaml

    sources:
      web: {dir: data/web, epochs: 2}        # read at most twice
      code: data/code
      wiki: data/wiki
    phases:
      - {web: 0.6, code: 0.3, wiki: 0.1}     # one phase alone may be written as `shares:`
      - {from: 0.9, code: 0.5, wiki: 0.5}    # for the last tenth of the run; a whole number is a sample's position
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from utils.paths import absent, expand
from utils.small_files import parse_yaml

_INLINE = re.compile(r"[^,]+:[0-9.]+(,[^,]+:[0-9.]+)*")
_LONGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Source:
    """One part of a mixture."""

    name: str
    path: Path
    """Its pretokenized directory."""
    epochs: Fraction | None = None
    """How often its samples may be read; None: as often as its share needs."""


@dataclass(frozen=True)
class MixtureSpec:
    """A mixture as it was asked for."""

    sources: tuple[Source, ...]
    phases: tuple[tuple[Fraction, tuple[Fraction, ...]], ...]
    """(Begin, share of each source). A begin below 1 is a part of the run, from 1 on a sample's position."""

    def wishes(self, total: int) -> list[tuple[int, tuple[Fraction, ...]]]:
        """(First position, shares) of each phase.

        Args:
            total: samples of the run.
        """
        return [(int(begin if begin >= 1 else begin * total), shares) for begin, shares in self.phases]


def is_mixture(text: str | Path) -> bool:
    """Whether a data directory's name stands for a mixture."""
    text = str(text)
    return not Path(text).is_dir() and bool(text.endswith((".yaml", ".yml")) or _INLINE.fullmatch(text))


def directories_of(text: str | Path) -> list[Path]:
    """The directories of a mixture, or the one directory.

    Raises:
        ValueError: it is a mixture that cannot be understood.
    """
    return [source.path for source in read_mixture(text).sources] if is_mixture(text) else [Path(text)]


def read_mixture(text: str | Path) -> MixtureSpec:
    """The mixture that a data directory's name stands for.

    Raises:
        ValueError: it cannot be understood.
    """
    text = str(text)
    if text.endswith((".yaml", ".yml")):
        return _read_file(Path(text))
    sources, shares = [], []
    for part in text.split(","):
        path, _, share = part.strip().rpartition(":")
        sources.append(Source(Path(path).name, Path(expand(path))))
        shares.append(_number(share, f"the share of {path}"))
    return _checked(sources, [(Fraction(0), tuple(shares))], f"--data_dir {text}")


def _read_file(path: Path) -> MixtureSpec:
    if not path.exists():
        raise ValueError(absent(path))
    if path.stat().st_size > _LONGEST_FILE:
        raise ValueError(f"{path} is too large for a mixture: it names sources and phases")
    try:
        found = parse_yaml(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, Mapping) or not isinstance(found.get("sources"), Mapping) or not found["sources"]:
        raise ValueError(f"{path} is no mixture: it has no `sources:` with a directory for each name")
    _refuse_others(found, ("sources", "shares", "phases"), f"{path}")
    sources = [_source(str(name), value, path) for name, value in found["sources"].items()]
    if ("shares" in found) == ("phases" in found):
        raise ValueError(f"{path} needs either `shares:`, a number for each source, or `phases:`, a list of such")
    phases = [found["shares"]] if "shares" in found else found["phases"]
    if not isinstance(phases, list) or not phases or not all(isinstance(phase, Mapping) for phase in phases):
        raise ValueError(f"the phases in {path} must be a list, each with a number for each source")
    read = []
    for number, phase in enumerate(phases, 1):
        where = f"phase {number} of {path}"
        _refuse_others(phase, ("from", *(source.name for source in sources)), where)
        begin = _number(phase.get("from", 0), f"`from` in {where}")
        if begin >= 1 and begin.denominator != 1:
            raise ValueError(f"`from` in {where} must be below 1, a part of the run, or a whole number of samples")
        shares = tuple(_number(phase.get(source.name, 0), f"{source.name} in {where}") for source in sources)
        read.append((begin, shares))
    return _checked(sources, read, str(path))


def _source(name: str, value: Any, path: Path) -> Source:
    if isinstance(value, str):
        value = {"dir": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("dir"), str):
        raise ValueError(f"source {name} in {path} needs a directory: `{name}: data/{name}`, or `dir:` and `epochs:`")
    _refuse_others(value, ("dir", "epochs"), f"source {name} in {path}")
    epochs = None
    if value.get("epochs") is not None:
        epochs = _number(value["epochs"], f"epochs of {name} in {path}")
        if epochs <= 0:
            raise ValueError(f"epochs of {name} in {path} must be positive, got {value['epochs']}")
    return Source(name, Path(expand(value["dir"])), epochs)


def _refuse_others(found: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    others = [str(key) for key in found if key not in known]
    if others:
        raise ValueError(f"{where} has {', '.join(others)}, which means nothing there: known are {', '.join(known)}")


def _number(value: Any, what: str) -> Fraction:
    try:
        if isinstance(value, bool):
            raise ValueError
        number = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{what} must be a number, got {value!r}") from None
    if number < 0:
        raise ValueError(f"{what} must not be negative, got {value}")
    return number


def _checked(sources: list[Source], phases: list[tuple[Fraction, tuple[Fraction, ...]]], where: str) -> MixtureSpec:
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where} has several sources called {', '.join(twice)}: name them in a YAML file")
    if phases[0][0] != 0:
        raise ValueError(f"the first phase of {where} must begin at 0: leave out its `from`")
    for _, shares in phases:
        if not any(shares):
            raise ValueError(f"a phase of {where} gives no source a share")
    return MixtureSpec(tuple(sources), tuple(phases))

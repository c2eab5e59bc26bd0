"""Paths as people write them: `~`, `~user`, `$NAME` and `${NAME}`, also where no shell has expanded them (in a file,
behind `--name=`, between quotes)."""

import os
import re
import shlex
from argparse import ArgumentTypeError
from contextlib import suppress
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:(?P<escaped>\$)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[^}]*)\})")


def expand(path: str) -> str:
    """A path for this machine, as a shell would hand it over: `~` at its beginning is a home directory, `$NAME` a
    variable's value, `$$` a dollar. A relative path stays relative.

    Raises:
        ValueError: there is no such user or variable, or it is empty, which would turn `$SCRATCH/run` into `/run`.
    """
    head, slash, rest = path.partition("/")
    if not head.startswith("~"):
        return _VARIABLE.sub(lambda match: _value(match, path), path)
    home = os.path.expanduser(head + slash)
    if home == head + slash or head == "~" and not os.path.expandvars("$HOME"):
        missing = f"there is no user {head[1:]!r} here" if head != "~" else "this user has no home directory here"
        raise ValueError(f"{path}: {missing}: write the path in full, and ./{head} for a file of that name")
    return home + _VARIABLE.sub(lambda match: _value(match, path), rest)


def _value(match: re.Match, path: str) -> str:
    if match["escaped"]:
        return "$"
    name = match["name"] or match["braced"]
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{path}: {match[0]} names no variable: write ${{NAME}}, and $$ for a dollar")
    value = os.path.expandvars(f"${name}")
    if value == f"${name}" or not value:
        state = "empty" if not value else "not set"
        raise ValueError(
            f"{path}: ${name} is {state} here: set it, or write the path in full, with $$ for a dollar in a name"
        )
    return value


def for_command(path: object) -> str:
    """A path of this machine as a word in a command of this project, which expands it once more."""
    escaped = str(path).replace("$", "$$")
    return shlex.quote(f"./{escaped}" if escaped.startswith("~") else escaped)


def for_remote_shell(path: str) -> str:
    """A path for a command line on another machine, where its shell expands it: `~` is the home directory there. The
    shell ends with a message if a variable is not set."""
    head, slash, rest = path.partition("/")
    home, rest = (head + slash, rest) if re.fullmatch("~[A-Za-z0-9._-]*", head) else ("", path)
    words, begin = [home], 0
    for match in _VARIABLE.finditer(rest):
        words.append(_quoted(rest[begin : match.start()]))
        words.append("'$'" if match["escaped"] else f'"${{{match["name"] or match["braced"]}:?}}"')
        begin = match.end()
    return "".join([*words, _quoted(rest[begin:])]) or "''"


def _quoted(text: str) -> str:
    return shlex.quote(text) if text else ""


_MOST_NAMES = 1000
"""Most names in a folder among which a similar one is looked for."""


def absent(path: str | Path, advice: str = "") -> str:
    """A sentence about a missing path, with the path that was probably meant.

    Args:
        advice: what to do if no name is similar.
    """
    near = near_to(Path(path))
    meant = f": did you mean {near[0]}?" if near else f": {advice}" if advice else ""
    return f"{path} does not exist{meant}"


def near_to(path: Path) -> list[Path]:
    """Existing paths with a similar name, the most similar first: the same except for one mistyped part, or in a folder
    that was left out."""
    parts = [part for part in path.parts if part != "."]
    wrong = next((n for n in range(len(parts)) if not os.path.exists(os.path.join(*parts[: n + 1]))), None)
    if wrong is None:
        return []
    folder, rest = Path(*parts[:wrong]), parts[wrong + 1 :]
    names = names_in(folder)
    folded = {name.casefold(): name for name in names}
    part = parts[wrong].casefold()
    # Short names with two letters the wrong way round are less similar than the cutoff asks for.
    alike = [name for name in folded if sorted(name) == sorted(part)] + get_close_matches(part, folded, 5, cutoff=0.7)
    # The suffix says little, unless the stem is short: hots.yaml does not mean tabs.yaml.
    stem, suffix = os.path.splitext(part)
    if suffix and len(stem) > 2:
        stems = {name: name.removesuffix(suffix) for name in alike}
        alike = [name for name in alike if get_close_matches(stem, [stems[name]], 1, cutoff=0.7) or name == stems[name]]
    alike = [folded[name] for name in alike]
    meant = [folder.joinpath(name, *rest) for name in alike]
    meant += [folder.joinpath(name, *parts[wrong:]) for name in names]
    return [one for one in meant if os.path.exists(one)]


def names_in(folder: Path) -> list[str]:
    """Visible names in a folder, sorted; none if it cannot be listed."""
    with suppress(OSError), os.scandir(folder) as entries:
        return sorted(entry.name for entry in islice(entries, _MOST_NAMES) if not entry.name.startswith("."))
    return []


def a_path(text: str) -> str:
    """An argument's type for argparse: `expand`, with its sentence as argparse wants it. An empty path, as from
    an unknown variable in a shell, is refused: it would be the working directory."""
    if not text:
        raise ArgumentTypeError("the path is empty: give one, or leave it out")
    try:
        return expand(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None

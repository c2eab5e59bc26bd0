"""All files below a folder, links followed, each file once.

A link to a folder is followed once, wherever it is met, and never if it leads back to a folder that it stands in, so
every walk ends. A file with several names is found under the one with the fewest links. Links that cannot be followed
are reported with the reason; only hidden names (".name") and caches are passed over in silence.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LEADS_NOWHERE = "links that lead nowhere"
LEADS_BACK = "links to a folder that they stand in"
OF_A_TOKENIZER = "folders of a tokenizer"
NAMED_TWICE = "other names of a file that is read"
NO_FILE = "no regular files"

_TOKENIZER_FILES = frozenset(
    "tokenizer.json tokenizer_config.json tokenizer.model chat_template.jinja special_tokens_map.json "
    "added_tokens.json vocab.json merges.txt report.json".split()
)


@dataclass(frozen=True)
class Found:
    """A file below the root, or a place where there might have been some."""

    path: str
    """Relative to the root."""
    problem: str = ""
    """Reason why it is not read, one of the above; empty for a file that can be read."""


def files_below(
    root: str, is_chosen: Callable[[str], bool], is_excluded: Callable[[str], bool] = lambda path: False
) -> list[Found]:
    """Every chosen file below `root`, and every problem, sorted by their paths.

    Args:
        is_chosen: whether a file of this path, relative to the root, is wanted.
        is_excluded: whether nothing below this path is wanted, so that a folder there need not be listed.
    Raises:
        OSError: a folder cannot be listed, or the state of a file cannot be read.
    """
    found: dict[str, Found] = {}
    names: list[tuple[int, str, str]] = []
    followed: set[str] = set()
    targets = [os.path.realpath(root)]
    starts, hops = [""], 0
    while starts:
        links: list[str] = []
        for start in starts:
            files = _walk(root, start, found, links, is_excluded)
            names += [(hops + is_link, path, real) for path, real, is_link in files if is_chosen(path)]
        starts = [link for link in sorted(links) if _is_to_be_followed(root, link, followed, targets, found)]
        hops += 1
    seen: set[str] = set()
    for _, path, real in sorted(names):
        found[path] = Found(path, NAMED_TWICE if real in seen else "")
        seen.add(real)
    return [found[path] for path in sorted(found)]


def _walk(
    root: str, start: str, found: dict[str, Found], links: list[str], is_excluded: Callable[[str], bool]
) -> Iterator[tuple[str, str, bool]]:
    """Files in a folder and below it, as (path, real path, whether it is a link). Links to folders are kept apart.

    Args:
        found: receives the problems.
        links: receives the links to folders.
    """

    def tell(path: str, problem: str) -> None:
        relative = os.path.relpath(path, root)
        found[relative] = Found(relative, problem)

    def refuse(error: OSError) -> None:
        relative = os.path.relpath(error.filename, root)
        # The lost+found of a file system is closed to users, and holds nothing of theirs.
        if is_excluded(f"{relative}/") or relative == "lost+found":
            return
        advice = f" (leave it out with --exclude '{relative}/*')" if isinstance(error, PermissionError) else ""
        raise OSError(error.errno, f"{error.strerror}{advice}", error.filename)

    for directory, folders, files in os.walk(os.path.join(root, start), onerror=refuse):
        if "tokenizer.json" in files and os.path.relpath(directory, root) != ".":
            # The tokenizer's folder beside our own tokens holds nothing else and is not worth a line.
            if folders or not _TOKENIZER_FILES.issuperset(files):
                tell(directory, OF_A_TOKENIZER)
            folders.clear()
            continue
        real_directory = os.path.realpath(directory)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in folders:
            full = os.path.join(directory, name)
            if os.path.islink(full):
                links.append(os.path.relpath(full, root))
        for name in files:
            full = os.path.join(directory, name)
            if name.startswith("."):
                continue
            is_link = os.path.islink(full)
            mode = _mode(full)
            if mode is None or not stat.S_ISREG(mode):
                tell(full, LEADS_NOWHERE if is_link and mode is None else NO_FILE)
                continue
            real = os.path.realpath(full) if is_link else os.path.join(real_directory, name)
            yield os.path.relpath(full, root), real, is_link


def _mode(path: str) -> int | None:
    """Mode of the file that a path leads to; None if it leads nowhere. Any other error is the disk's, and not a reason
    to leave the file out."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def _is_to_be_followed(root: str, link: str, followed: set[str], targets: list[str], found: dict[str, Found]) -> bool:
    """Whether to walk through the folder that a link leads to.

    Args:
        followed: real paths of the links that were followed; receives this one.
        targets: folders that are read whole, the root and those that links led to; receives this link's.
        found: receives the problem.
    """
    parent, name = os.path.split(os.path.join(root, link))
    itself = os.path.join(os.path.realpath(parent), name)
    if itself in followed:
        return False
    followed.add(itself)
    target = os.path.realpath(itself)
    if _is_below(itself, target):
        if not any(_is_below(target, other) for other in targets):
            found[link] = Found(link, LEADS_BACK)
        return False
    targets.append(target)
    return True


def _is_below(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it; both are free of links."""
    return os.path.commonpath([path, folder]) == folder

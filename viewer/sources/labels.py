"""Names that tell runs from each other, and their order."""

import posixpath
import re
from collections import Counter
from collections.abc import Sequence

from runs.layout import RESLOG_NAME
from utils.text import plain
from viewer.sources.run import Run


def in_order(text: str) -> tuple[tuple[bool, int, str], ...]:
    """A key to sort names by, which puts run-2 before run-10."""
    # Every second part is a number of no more digits than int() takes.
    parts = enumerate(re.split(r"([0-9]{1,300})", text))
    return tuple((place % 2 == 1, int(part) if place % 2 else 0, part) for place, part in parts if part)


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run: the end of its path that tells it from the others, with its host if needed."""
    parts = []
    for run in runs:
        path = run.directory if run.path.endswith("/" + RESLOG_NAME) or run.path == RESLOG_NAME else run.path
        absolute = posixpath.abspath(path) if run.target is None else posixpath.normpath(path)
        parts.append([part for part in absolute.split("/") if part] or [absolute])
    names = [found[-1] for found in parts]
    for length in range(2, max(map(len, parts), default=1) + 1):
        twice = {name for name, count in Counter(names).items() if count > 1}
        if not twice:
            break
        names = ["/".join(found[-length:]) if name in twice else name for name, found in zip(names, parts)]
    hosts = [run.target.host if run.target else "" for run in runs]
    several, counts = len(set(hosts)) > 1, Counter(names)
    found = [
        plain(f"{host}: {name}" if host and (several or counts[name] > 1) else name, 80)
        for name, host in zip(names, hosts)
    ]
    # The same name twice: other ports or users of a host, or one run at two addresses.
    seen, counts = Counter(), Counter(found)
    for index, name in enumerate(found):
        if counts[name] > 1:
            seen[name] += 1
            found[index] = f"{name} ({seen[name]})"
    return found

"""Made-up results of a run."""

import json

from runs.history import RunHistory, Snapshot


def line(name: str, **values) -> bytes:
    """A record without its line end."""
    return json.dumps({"name": name, "time": 1000.0, **values}).encode()


def text_line(name: str, **values) -> str:
    """A record as a line of the file."""
    return line(name, **values).decode() + "\n"


def snapshot_of(*lines: bytes) -> Snapshot:
    data = RunHistory()
    data.feed(lines)
    return data.snapshot()

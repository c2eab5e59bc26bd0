"""Results of a run as tests make them up."""

import json

from runs.history import RunHistory, Snapshot


def line(name: str, **values) -> bytes:
    """A record without the line's end."""
    return json.dumps({"name": name, "time": 1000.0, **values}).encode()


def text_line(name: str, **values) -> str:
    """A record as it is written to a file."""
    return line(name, **values).decode() + "\n"


def snapshot_of(*lines: bytes) -> Snapshot:
    data = RunHistory()
    data.feed(lines)
    return data.snapshot()

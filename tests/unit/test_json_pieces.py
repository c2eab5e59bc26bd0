"""A JSON file read value by value gives the same as all at once, however the file is cut, and memory never holds more
of it than its largest value."""

import io
import json
import random
import tracemalloc

import pytest

from runs import json_pieces
from runs.json_pieces import JSONPieces, TooLarge


def read(data: bytes, longest: int = 10_000, most: int = 1 << 30) -> dict:
    """The object as json.loads returns it, put together from the pieces; an empty list under "events" gives no
    piece."""
    found: dict = {}
    for key, value in JSONPieces(io.BytesIO(data), longest, most).members("events"):
        if key == "events":
            found.setdefault(key, []).append(value)
        else:
            found[key] = value
    return found


def value_of(random_: random.Random, depth: int = 0) -> object:
    kind = random_.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return random_.choice([None, True, False, -0.5e-7, 1e30])
    if kind in (1, 2):
        return random_.randrange(-(10**9), 10**9)
    if kind in (3, 4):
        return "".join(random_.choice('ab"\\\n{}[],:é😀 \u2028') for _ in range(random_.randrange(9)))
    if kind in (5, 6):
        return [value_of(random_, depth + 1) for _ in range(random_.randrange(4))]
    return {f"k{number}": value_of(random_, depth + 1) for number in range(random_.randrange(4))}


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
def test_the_pieces_are_what_the_whole_is(piece: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_pieces, "_PIECE_BYTES", piece)
    random_ = random.Random(piece)
    for _ in range(150):
        whole = {f"k{number}": value_of(random_) for number in range(random_.randrange(4))}
        whole["events"] = [value_of(random_) for _ in range(random_.randrange(1, 6))]
        layout = random_.choice([{}, {"indent": 1}, {"separators": (",", ":")}])
        data = json.dumps(whole, ensure_ascii=random_.random() < 0.5, **layout).encode()
        assert read(data) == whole
        for damaged in (
            data[: random_.randrange(len(data))],
            data[: (at := random_.randrange(len(data)))] + bytes([random_.randrange(256)]) + data[at + 1 :],
        ):
            try:
                is_good = isinstance(json.loads(damaged), dict)
            except ValueError:
                is_good = False
            if is_good:
                read(damaged)
            else:
                with pytest.raises(ValueError):
                    read(damaged)


@pytest.mark.parametrize(("data", "said"), [
    (b"", "not whole JSON"), (b"[1]", "not a JSON object"), (b"x", "not a JSON object"), (b"{} {}", "not whole JSON"),
    (b'{"a" 1}', "not whole JSON"), (b"{1: 2}", "not whole JSON"), (b'{"a": 1,}', "not whole JSON"),
    (b'{"events": [1, 2', "not whole JSON"), (b'{"events": [1 2]}', "not whole JSON"),
    (b'{"a": "\xff"}', "not whole JSON"),
    (b'{"a": "' + b"x" * 20_000 + b'"}', "a value of more than 10,000 characters"),
    (b'{"events": [0, "' + b"x" * 9_000_000 + b'"]}', "a value of more than 10,000 characters"),
    (b'{"a": ' * 900_000, "a value of more than 10,000 characters"), (b'{"a": ' + b"9" * 5000 + b"}", "not whole JSON"),
])  # fmt: skip
def test_what_is_broken_or_too_large_is_said(data: bytes, said: str):
    with pytest.raises(ValueError, match=said):
        read(data)


def test_a_file_of_more_than_was_asked_for():
    data = b'{"a": 1' + b" " * (3 << 20) + b"}"
    assert read(data) == {"a": 1} == read(data, most=len(data))
    with pytest.raises(TooLarge, match="is larger than 2 MiB"):
        read(data, most=len(data) - (1 << 20))


def test_a_long_list_takes_no_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_pieces, "_PIECE_BYTES", 1000)
    data = b'{"events": [' + b"[],[],[],[]," * 5_000 + b"0]}"
    tracemalloc.start()
    try:
        assert sum(1 for _ in JSONPieces(io.BytesIO(data), 1000, 1 << 30).members("events")) == 20_001
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 17

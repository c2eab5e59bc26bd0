"""Documents of several domains, by which models are compared in bits per byte. Each is a few thousand bytes long.

python    the beginnings of modules of the standard library, as the running interpreter has them
prose     pages of the language's reference, in English, which the interpreter carries as the help of `help()`
tables    JSON, CSV and Markdown, made here
numbers   dates, times, sums and prices, made here
chinese   sentences, made here
"""

import importlib.util
import json
import sysconfig
from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from random import Random
from typing import NamedTuple

from evaluation.own.words import CITIES, COLORS, NAMES, NOUNS

DOMAINS = ("python", "prose", "tables", "numbers", "chinese")
_MODULES = (
    "textwrap", "json/decoder", "heapq", "shlex", "calendar", "queue", "fnmatch", "csv", "string", "copy",
    "bisect", "colorsys", "glob", "logging/handlers", "sched", "wsgiref/headers",
)  # fmt: skip
_TOPICS = (
    "objects", "naming", "execmodel", "calls", "exceptions", "context-managers", "assignment", "floating", "booleans",
    "try", "with", "yield", "debugger", "identifiers", "raise", "customization",
)  # fmt: skip
_MOST_BYTES = 3000
"""Of a document that is taken from elsewhere: it is cut at a line end before them."""
_COUNT = 12
"""Documents of a domain that are made here."""


class Document(NamedTuple):
    """A document."""

    domain: str
    name: str
    text: str


def documents() -> list[Document]:
    """Documents of all domains, one of each in turn. Two domains need files of the interpreter, which may lack them."""
    made = [_made("tables", _table), _made("numbers", _numbers), _made("chinese", _chinese)]
    turns = zip_longest(_modules(), _pages(), *made)
    return [document for document in chain.from_iterable(turns) if document is not None]


def _modules() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in _MODULES:
        path = root / f"{name}.py"
        if path.is_file():
            yield Document("python", name, _beginning(path.read_text(encoding="utf-8")))


def _pages() -> Iterator[Document]:
    if importlib.util.find_spec("pydoc_data.topics") is None:
        return
    from pydoc_data.topics import topics

    for name in _TOPICS:
        if name in topics:
            yield Document("prose", name, _beginning(topics[name]))


def _beginning(text: str) -> str:
    whole = text.encode()
    if len(whole) <= _MOST_BYTES:
        return text
    return whole[: whole.rindex(b"\n", 0, _MOST_BYTES) + 1].decode()


def _made(domain: str, make: Callable[[Random, int], str]) -> Iterator[Document]:
    for number in range(_COUNT):
        yield Document(domain, f"{domain}-{number}", make(Random(f"{domain} {number}"), number))


def _table(rng: Random, number: int) -> str:
    rows = [
        {"id": rng.randrange(100, 1000) + 1000 * row, "name": rng.choice(NAMES), "city": rng.choice(CITIES),
         "item": f"{rng.choice(COLORS)} {rng.choice(NOUNS)}", "count": rng.randrange(1, 50),
         "paid": rng.random() < 0.5}
        for row in range(1, 15)
    ]  # fmt: skip
    if number % 3 == 0:
        return json.dumps(rows, indent=2) + "\n"
    heads = list(rows[0])
    lines = [[str(value) for value in row.values()] for row in rows]
    if number % 3 == 1:
        return "".join(",".join(line) + "\n" for line in [heads, *lines])
    return "".join("| " + " | ".join(line) + " |\n" for line in [heads, ["---"] * len(heads), *lines])


def _numbers(rng: Random, number: int) -> str:
    day = rng.randrange(1, 20)
    lines = []
    for row in range(20):
        month, hour, minute = rng.randrange(1, 13), rng.randrange(24), rng.randrange(60)
        first, second, price = rng.randrange(1000), rng.randrange(1000), rng.randrange(100, 100000)
        lines.append((
            f"2024-{month:02d}-{day + row % 9:02d} {hour:02d}:{minute:02d}:00 {price / 100:.2f}",
            f"{first} + {second} = {first + second}",
            f"{row + 1}. {day + row}.{month}.{1990 + row}: {price / 100:.2f} EUR, {second / 10:.1f}%",
        )[number % 3])  # fmt: skip
    return "\n".join(lines) + "\n"


_WHEN = ("今天", "昨天", "上个星期", "去年夏天", "每天早上", "有一天")
_WHO = ("我的朋友", "妈妈", "老师", "小李", "邻居家的孩子", "我们", "哥哥")
_WHERE = ("公园", "学校", "图书馆", "河边", "城里", "山上", "市场")
_WHAT = ("看书", "买了一些水果", "学习中文", "和朋友聊天", "画了一张画", "听音乐", "吃了午饭")
_THEN = ("天气很好，大家都很高兴。", "后来下雨了，我们就回家了。", "那里的人很多。", "这是一个安静的地方。",
         "时间过得很快。")  # fmt: skip
_ADDED = ("他说明天还想再来。", "我觉得这件事很有意思。", "晚上回到家里，已经八点了。", "这本书讲的是一个古老的故事。")


def _chinese(rng: Random, number: int) -> str:
    lines = []
    for _ in range(4 + number % 3):
        line = "".join(
            f"{rng.choice(_WHEN)}{rng.choice(_WHO)}在{rng.choice(_WHERE)}{rng.choice(_WHAT)}。{rng.choice(_THEN)}"
            for _ in range(2)
        )
        lines.append(line + rng.choice(_ADDED))
    return "\n".join(lines) + "\n"

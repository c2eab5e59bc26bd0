"""Answers of a model, kept in a file as they come: an evaluation that was killed asks for the rest alone.

    answers-FINGERPRINT.jsonl    {"key": "9f0c...", "score": [-3.25, true]}
                                 {"key": "51ab...", "written": ["def f(", false]}

A key is a digest of what was asked, to the token, so the file serves every task and every setting. Another model has
another fingerprint, hence another file.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation.asking import Answerer, Score, Scoring, Writing, Written

logger = logging.getLogger(__name__)


def key_of(asked: Scoring | Writing) -> str:
    """Digest of what was asked."""
    text = json.dumps([type(asked).__name__, asdict(asked)], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Journal:
    """An Answerer that asks another one only what the file does not know.

    Args:
        directory: where the file lies; it is made.
        fingerprint: of the model with its adapter, and of whatever else decides its answers, such as the dtype.
    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(self, answerer: Answerer, directory: Path, fingerprint: str):
        self._answerer = answerer
        self.tokenizer, self.context, self.can_write = answerer.tokenizer, answerer.context, answerer.can_write
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"answers-{fingerprint[:16]}.jsonl"
        self._known = dict(_read(path))
        self._file = path.open("ab")
        if self._file.tell() and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")
        self.num_known, self.num_asked = 0, 0

    def score(self, asked: Sequence[Scoring]) -> Iterator[tuple[int, Score]]:
        return self._answer(asked, "score", lambda value: Score(float(value[0]), bool(value[1])), self._answerer.score)

    def write(self, asked: Sequence[Writing]) -> Iterator[tuple[int, Written]]:
        return self._answer(asked, "written", lambda value: Written(*value), self._answerer.write)

    def close(self) -> None:
        self._file.close()

    def _answer(
        self, asked: Sequence[Any], kind: str, parse: Callable[[Any], Any],
        ask: Callable[[Sequence[Any]], Iterator[tuple[int, Any]]],
    ) -> Iterator[tuple[int, Any]]:  # fmt: skip
        """Known answers first. What is asked twice is computed once."""
        places: dict[str, list[int]] = {}
        for place, one in enumerate(asked):
            places.setdefault(key_of(one), []).append(place)
        missing = [key for key in places if kind not in self._known.get(key, ())]
        for key in places.keys() - set(missing):
            answer = parse(self._known[key][kind])
            for place in places[key]:
                self.num_known += 1
                yield place, answer
        for number, answer in ask([asked[places[key][0]] for key in missing]):
            key = missing[number]
            record = {"key": key, kind: list(answer)}
            self._known[key] = record
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            self.num_asked += 1
            for place in places[key]:
                yield place, answer


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of a file by their keys. A torn line, as a kill leaves it, is asked again."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            yield record["key"], record
        except (ValueError, KeyError, TypeError):
            logger.warning("line %d of %s is torn: what it answered is asked again", number, path)

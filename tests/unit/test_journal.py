"""Answers that are kept: what was answered once is not asked again."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation.asking import Score, Scoring, Writing, Written
from evaluation.journal import Journal


class Stub:
    """Answers each request by its own numbers, and notes what it was asked."""

    tokenizer: Any = None
    context, can_write = 100, True

    def __init__(self, most: int = 1000):
        self.asked: list[Scoring | Writing] = []
        self._most = most

    def score(self, asked: Sequence[Scoring]) -> Iterator[tuple[int, Score]]:
        for place in reversed(range(len(asked))):
            if len(self.asked) == self._most:
                raise KeyboardInterrupt
            self.asked.append(asked[place])
            yield place, Score(-sum(asked[place].continuation) / 3, bool(sum(asked[place].context) % 2))

    def write(self, asked: Sequence[Writing]) -> Iterator[tuple[int, Written]]:
        for place, one in enumerate(asked):
            self.asked.append(one)
            yield place, Written(f"{sum(one.prompt)} \udc80 é", one.seed > 0)


QUESTIONS = [Scoring((n, 1), (n + 1,)) for n in range(6)]


def test_a_killed_evaluation_goes_on_without_asking_twice(tmp_path: Path) -> None:
    expected = dict(Stub().score(QUESTIONS))
    killed = Stub(most=4)
    journal, found = Journal(killed, tmp_path, "f"), {}
    try:
        for place, answer in journal.score(QUESTIONS):
            found[place] = answer
    except KeyboardInterrupt:
        journal.close()
    assert len(killed.asked) == 4
    # The kill may have torn the last line.
    (path,) = tmp_path.glob("answers-*.jsonl")
    path.write_bytes(path.read_bytes()[:-9])
    second = Stub()
    journal = Journal(second, tmp_path, "f")
    assert dict(journal.score(QUESTIONS)) == expected
    assert (len(second.asked), journal.num_known, journal.num_asked) == (3, 3, 3)
    journal.close()
    third = Stub()
    assert dict(Journal(third, tmp_path, "f").score(QUESTIONS)) == expected and not third.asked


def test_what_is_asked_twice_is_computed_once(tmp_path: Path) -> None:
    stub = Stub()
    twice = [*QUESTIONS, *QUESTIONS]
    found = dict(Journal(stub, tmp_path, "f").score(twice))
    assert len(stub.asked) == 6 and found == dict(Stub().score(twice))


def test_another_model_or_another_seed_is_asked_anew(tmp_path: Path) -> None:
    texts = [Writing((1, 2), 5), Writing((1, 2), 5, seed=1), Writing((1, 2), 6)]
    stub = Stub()
    for fingerprint in ("one", "two", "one"):
        journal = Journal(stub, tmp_path, fingerprint)
        assert dict(journal.write(texts)) == dict(Stub().write(texts))
        journal.close()
    assert len(stub.asked) == 6

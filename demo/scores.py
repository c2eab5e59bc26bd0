"""Shares with their standard errors, and the verdict whether a change is more than noise."""

import json
import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Score:
    """A share, as the mean of one part for each independent question.

    Answers to the same question resemble each other, so the error is computed from the questions' shares.
    """

    parts: list[float]

    @property
    def mean(self) -> float:
        return sum(self.parts) / len(self.parts)

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite for a single part."""
        count, mean = len(self.parts), self.mean
        if count < 2:
            return math.inf
        return math.sqrt(sum((part - mean) ** 2 for part in self.parts) / (count - 1) / count)

    def __str__(self) -> str:
        return f"{self.mean:.1%} ± {self.error:.1%}"


def difference(before: Score, after: Score) -> Score:
    """Difference question by question, so that a question's difficulty cancels out.

    Raises:
        ValueError: they are not the same questions.
    """
    if len(before.parts) != len(after.parts):
        raise ValueError(f"{len(before.parts)} and {len(after.parts)} parts cannot be compared one by one")
    return Score([b - a for a, b in zip(before.parts, after.parts)])


def verdict(change: Score) -> str:
    """The change in words; it counts if it is more than two standard errors."""
    if abs(change.mean) <= 2 * change.error:
        return "not beyond noise"
    return "improved" if change.mean > 0 else "worse"


def read_answers(path: Path) -> list[dict]:
    """Records that `demo.answer` wrote.

    Raises:
        ValueError, OSError: the file holds something else, or cannot be read.
    """
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        is_known = all(
            {"text", "tokens", "ends", "good"} <= set(a) for r in records if r["question"] for a in r["answers"]
        )
    except (LookupError, TypeError, ValueError):
        is_known = False
    if not is_known or not records:
        raise ValueError(f"{path} holds no answers: give a file that demo.answer wrote")
    return records


def score_of(records: list[dict], field: str = "good") -> Score:
    """Share of answers whose `field` is true, from each question's share."""
    return Score([sum(answer[field] for answer in r["answers"]) / len(r["answers"]) for r in records])


def describe(records: list[dict]) -> str:
    """Summary of the answers in one line."""
    answers = [answer for record in records for answer in record["answers"]]
    good = [answer for answer in answers if answer["good"]]
    length = sum(answer["tokens"] for answer in good) / max(1, len(good))
    distinct = len({body_of(answer["text"]) for answer in good})
    return (
        f"of {len(answers)} answers to {len(records)} questions {sum(a['ends'] for a in answers)} end by themselves, "
        f"{len(good)} are the function that was asked for ({score_of(records)}); these have {length:.0f} tokens on "
        f"average and {distinct} different bodies"
    )


def body_of(text: str) -> str:
    """Text after the first line, in which answers to different questions differ anyway."""
    return text.strip().partition("\n")[2]

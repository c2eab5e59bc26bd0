"""zero_arithmetic: sums, differences and products of numbers with one to four digits, after four examples.

    12 + 35 = 47
    ...
    60 + 21 =

"acc" is the share of answers whose tokens, line end included, are each the likeliest; "exact" is the share that the
model writes. Both are graded by digits and, of "acc", by operation. Small models get almost none right, so
"bits" says how surprising the right answer is, on average: it falls long before "acc" rises.
"""

import math
import operator
import time
from random import Random
from typing import NamedTuple

from evaluation.asking import Answerer, Scoring, Writing
from evaluation.own.outcomes import Record, figures_of, fingerprint, outcome, too_long
from evaluation.own.questions import Asker, said, scores_of, texts_of
from evaluation.task import Options, Outcome

DIGITS = (1, 2, 3, 4)
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_EACH = 8
"""Questions for each operation and number of digits."""
_DRAWN = 40
"""Pairs of numbers that are drawn for these and their examples: there are only 45 differences of digits."""
_ROOM = 4
"""Tokens that an answer may have beyond the right one's."""


class Sum(NamedTuple):
    """A question."""

    digits: int
    sign: str
    text: str
    answer: str


def questions(num_fewshot: int, seed: int) -> list[Sum]:
    """All questions, one of each operation and number of digits in turn.

    Args:
        num_fewshot: examples before each.
        seed: by which these are drawn.
    Raises:
        ValueError: there are not so many examples.
    """
    if num_fewshot > _DRAWN - _EACH:
        raise ValueError(f"zero_arithmetic has {_DRAWN - _EACH} examples, not --num_fewshot={num_fewshot}")
    found = []
    drawn = {(digits, sign): _pairs(digits, sign) for digits in DIGITS for sign in OPERATIONS}
    for number in range(_EACH):
        for (digits, sign), pairs in drawn.items():
            rng = Random(f"arithmetic example {sign} {digits} {number} {seed}")
            shown = rng.sample(pairs[_EACH:], num_fewshot)
            text = "".join(f"{_left(pair, sign)} {_right(pair, sign)}\n" for pair in shown)
            found.append(Sum(digits, sign, text + _left(pairs[number], sign), _right(pairs[number], sign)))
    return found


class ArithmeticTask:
    name, version = "zero_arithmetic", "1"
    needs_writing = runs_code = False
    takes_examples = True

    def run(self, answerer: Answerer, options: Options) -> Outcome:
        """
        Raises:
            ValueError: the questions are to be put by a chat template, and the model has none; or there are not so
                many examples.
        """
        begun = time.monotonic()
        num_fewshot = 4 if options.num_fewshot is None else options.num_fewshot
        asker = Asker(answerer, options, "Compute the last line. Answer with the number alone.")
        made = questions(num_fewshot, options.seed)
        samples: list[Record] = []
        asked: list[tuple[Record, Scoring, Writing]] = []
        for one in made[: options.limit]:
            samples.append({"digits": one.digits, "operation": one.sign, "question": one.text, "right": one.answer})
            scorings = asker.scorings(one.text, [f" {one.answer}"], is_whole=True)
            writing = asker.writing(one.text, len(asker.tokenizer.encode(one.answer)) + _ROOM, ("\n",))
            if scorings and writing:
                asked.append((samples[-1], scorings[0], writing))
            else:
                samples[-1]["left_out"] = too_long(answerer.context)
        for (sample, *_), score in zip(asked, scores_of(answerer, [scoring for _, scoring, _ in asked])):
            sample |= {"acc": float(score.is_greedy), "bits": -score.logprob / math.log(2)}
        if answerer.can_write:
            for (sample, *_), written in zip(asked, texts_of(answerer, [writing for *_, writing in asked])):
                sample |= {"written": written.text, "exact": float(said(written.text) == sample["right"])}
        figures = (
            figures_of(samples, "acc", "digits") | figures_of(samples, "acc", "operation")
            | figures_of(samples, "exact", "digits") | figures_of(samples, "bits", "digits", higher_is_better=False)
        )  # fmt: skip
        return outcome(self, options, begun, figures, samples, fingerprint(made), num_fewshot=num_fewshot,
                       seed=options.seed)  # fmt: skip


def _pairs(digits: int, sign: str) -> list[tuple[int, int]]:
    """Different pairs of numbers with so many digits, for questions and then for examples; no difference is below 0."""
    rng = Random(f"arithmetic {sign} {digits}")
    found: dict[tuple[int, int], None] = {}
    while len(found) < _DRAWN:
        first, second = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        found[(max(first, second), min(first, second)) if sign == "-" else (first, second)] = None
    return list(found)


def _left(pair: tuple[int, int], sign: str) -> str:
    return f"{pair[0]} {sign} {pair[1]} ="


def _right(pair: tuple[int, int], sign: str) -> str:
    return str(OPERATIONS[sign](*pair))

"""zero_copying: the model copies a random string or list, after an example that shows it.

    Text: qmzt
    Copy: qmzt

    Text: vbnr
    Copy:

Nothing is to be known here: what counts is whether attention finds the text and follows it, token by token. "acc" is
the share in which the right copy is the likeliest of four: the others are the text with two neighbours swapped, the
example's, and a new one. "exact" is the share that the model writes to the letter. "gain" is finer: by how many bits an
item the copy is likelier than the same letters or words after another text; a model that copies nothing gains 0. All
are graded by length, in items.
"""

import math
import time
from collections.abc import Sequence
from random import Random
from string import ascii_lowercase
from typing import NamedTuple

from evaluation.asking import Answerer, Scoring, Writing
from evaluation.own.outcomes import Record, figures_of, fingerprint, outcome, too_long
from evaluation.own.questions import Asker, likeliest, said, scores_of, texts_of
from evaluation.own.words import NOUNS
from evaluation.results import Figure
from evaluation.task import Options, Outcome

LENGTHS = (4, 8, 16, 32)
"""Letters of a string, or words of a list."""
_EACH = 12
"""Questions of a length, half of them with letters and half with words."""
_ROOM = 8
"""Tokens that an answer may have beyond the right one's."""


class Copying(NamedTuple):
    """A question."""

    length: int
    text: str
    other: str
    """The same with another text, of which the right choice is no copy."""
    choices: tuple[str, ...]
    right: int
    """Place of the right choice."""


def questions(num_fewshot: int, seed: int) -> list[Copying]:
    """All questions, one of each length in turn.

    Args:
        num_fewshot: examples before each.
        seed: by which these are drawn.
    """
    found = []
    for number in range(_EACH):
        for length in LENGTHS:
            rng, examples = (Random(f"copying {length} {number}{of}") for of in ("", f" example {seed}"))
            shown = [_draw(examples, length, number) for _ in range(max(1, num_fewshot))]
            items = _draw(rng, length, number)
            wrong = [_swapped(rng, items), shown[-1], _draw(rng, length, number)]
            before = "".join(f"Text: {_joined(one)}\nCopy: {_joined(one)}\n\n" for one in shown[:num_fewshot])
            text, other = (f"{before}Text: {_joined(one)}\nCopy:" for one in (items, wrong[-1]))
            place = number // 2 % 4
            choices = [_joined(one) for one in (*wrong[:place], items, *wrong[place:])]
            found.append(Copying(length, text, other, tuple(choices), place))
    return found


class CopyingTask:
    name, version = "zero_copying", "1"
    needs_writing = runs_code = False
    takes_examples = True

    def run(self, answerer: Answerer, options: Options) -> Outcome:
        """
        Raises:
            ValueError: the questions are to be put by a chat template, and the model has none.
        """
        begun = time.monotonic()
        num_fewshot = 1 if options.num_fewshot is None else options.num_fewshot
        asker = Asker(answerer, options, "Copy the last text. Answer with the copy alone.")
        made = questions(num_fewshot, options.seed)
        samples: list[Record] = []
        asked: list[tuple[Record, Copying, list[Scoring], Writing]] = []
        for one in made[: options.limit]:
            answer = one.choices[one.right]
            samples.append({"length": one.length, "question": one.text, "right": answer, "choices": one.choices})
            scorings = asker.scorings(one.text, [f" {choice}" for choice in one.choices])
            scorings += asker.scorings(one.other, [f" {answer}"])
            writing = asker.writing(one.text, len(asker.tokenizer.encode(answer)) + _ROOM, ("\n",))
            if len(scorings) == 1 + len(one.choices) and writing:
                asked.append((samples[-1], one, scorings, writing))
            else:
                samples[-1]["left_out"] = too_long(answerer.context)
        scores = iter(scores_of(answerer, [scoring for *_, scorings, _ in asked for scoring in scorings]))
        for sample, one, scorings, _ in asked:
            *logprobs, without = [next(scores).logprob for _ in scorings]
            gain = (logprobs[one.right] - without) / math.log(2) / one.length
            sample |= {"logprobs": logprobs, "acc": float(likeliest(logprobs) == one.right), "gain": gain}
        if answerer.can_write:
            for (sample, one, *_), written in zip(asked, texts_of(answerer, [writing for *_, writing in asked])):
                sample |= {"written": written.text, "exact": float(said(written.text) == one.choices[one.right])}
        figures: dict[str, Figure] = {}
        for metric in ("acc", "exact", "gain"):
            figures |= figures_of(samples, metric, "length")
        return outcome(self, options, begun, figures, samples, fingerprint(made), chance={"acc": 0.25, "gain": 0.0},
                       num_fewshot=num_fewshot, seed=options.seed)  # fmt: skip


def _draw(rng: Random, length: int, number: int) -> Sequence[str]:
    """Letters, no two neighbours alike, for even numbers; different words for odd ones."""
    if number % 2:
        return rng.sample(NOUNS, length)
    letters = [rng.choice(ascii_lowercase)]
    while len(letters) < length:
        letters.append(rng.choice(ascii_lowercase.replace(letters[-1], "")))
    return letters


def _swapped(rng: Random, items: Sequence[str]) -> Sequence[str]:
    place = rng.randrange(len(items) - 1)
    return [*items[:place], items[place + 1], items[place], *items[place + 2 :]]


def _joined(items: Sequence[str]) -> str:
    return ("" if len(items[0]) == 1 else ", ").join(items)

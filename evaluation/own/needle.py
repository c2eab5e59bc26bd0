"""zero_needle: four facts, then filler, then the question for one of them.

    Anna's number is 417. Leo's number is 933. Rosa's number is 250. Paul's number is 682.
    The old garden is near the lake. ...                                         <- filler
    Rosa's number is                                                             <- 250, or one of the other three?

The facts stand side by side in any order, so a model that says the last number, or any of them, is right in a quarter
of the cases, at every distance. Texts take a quarter to the whole of the model's context, but 8,192 tokens at most;
"acc" is graded by this share. The record of a sample has the distance in tokens.
"""

import time
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from evaluation.asking import Answerer, Scoring
from evaluation.own.outcomes import Record, figures_of, fingerprint, outcome
from evaluation.own.questions import Asker, likeliest, scores_of
from evaluation.own.words import ADJECTIVES, NAMES, NOUNS
from evaluation.task import Options, Outcome

SHARES = ("25%", "50%", "75%", "100%")
"""Of the context."""
_EACH = 16
"""Questions of each share."""
_LONGEST = 8192
"""Tokens of a text at most: much longer ones would take hours on a CPU."""


class Needle(NamedTuple):
    """A question."""

    share: str
    facts: str
    filler: str
    question: str
    choices: tuple[str, ...]
    right: int
    """Place of the right choice."""


def needle(share: str, number: int, most: int, length_of: Callable[[str], int]) -> Needle:
    """A question.

    Args:
        most: tokens of facts, filler and question with its answer together. The filler has as many sentences as fit:
            none, if there is no room for it.
        length_of: tokens of a text.
    """
    rng = Random(f"needle {share} {number}")
    names = rng.sample(NAMES, 4)
    numbers = [str(one) for one in rng.sample(range(100, 1000), 4)]
    facts = " ".join(map(_fact, names, numbers))
    right = number % 4
    question = f"{names[right]}'s number is"
    room = most - length_of(f"{facts}\n\n{_fact(names[right], numbers[right])}")
    sentences: list[str] = []
    while (room := room - length_of(f" {(sentence := _sentence(rng))}")) >= 0:
        sentences.append(sentence)
    return Needle(share, facts, " ".join(sentences), question, tuple(numbers), right)


class NeedleTask:
    name, version = "zero_needle", "1"
    needs_writing = runs_code = False
    takes_examples = False

    def run(self, answerer: Answerer, options: Options) -> Outcome:
        """
        Raises:
            ValueError: the questions are to be put by a chat template, and the model has none.
        """
        begun = time.monotonic()
        asker = Asker(answerer, options, "Say how the last sentence of this text ends.")
        known: dict[str, int] = {}

        def length_of(text: str) -> int:
            if text not in known:
                known[text] = len(asker.tokenizer.encode(text))
            return known[text]

        wrapping = max((len(one.context + one.continuation) for one in asker.scorings("a", [" 1"])), default=0)
        context = min(answerer.context, _LONGEST)
        made = [
            needle(share, number, int(context * int(share[:-1]) / 100) - wrapping, length_of)
            for number in range(_EACH) for share in SHARES
        ]  # fmt: skip
        samples: list[Record] = []
        asked: list[tuple[Record, Needle, list[Scoring]]] = []
        for one in made[: options.limit]:
            distance = length_of(one.filler) + length_of(one.question)
            samples.append({
                "share": one.share, "distance": distance, "facts": one.facts, "question": one.question,
                "choices": one.choices, "right": one.choices[one.right],
            })  # fmt: skip
            text = "\n".join([one.facts, one.filler, one.question])
            scorings = asker.scorings(text, [f" {choice}" for choice in one.choices])
            if scorings and one.filler:
                asked.append((samples[-1], one, scorings))
            else:
                samples[-1]["left_out"] = f"longer than {one.share} of {context} tokens, which the model knows"
        scores = iter(scores_of(answerer, [scoring for *_, scorings in asked for scoring in scorings]))
        for sample, one, scorings in asked:
            logprobs = [next(scores).logprob for _ in scorings]
            sample |= {"logprobs": logprobs, "acc": float(likeliest(logprobs) == one.right)}
        distances = {
            share: max(sample["distance"] for sample, one, _ in asked if one.share == share)
            for share in SHARES if any(one.share == share for _, one, _ in asked)
        }  # fmt: skip
        figures = figures_of(samples, "acc", "share")
        return outcome(self, options, begun, figures, samples, fingerprint(made), chance={"acc": 0.25},
                       distances=distances)  # fmt: skip


def _fact(name: str, number: str) -> str:
    return f"{name}'s number is {number}."


def _sentence(rng: Random) -> str:
    first, second = rng.sample(NOUNS, 2)
    return f"The {rng.choice(ADJECTIVES)} {first} is {rng.choice(('near', 'behind', 'under'))} the {second}."

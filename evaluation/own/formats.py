"""zero_format: the model goes on in the form that two examples show: JSON, a list with dashes, or yes and no.

"format" is the share of answers that have the form and end, whatever they say; "correct" is the share that say the
right thing in it. One who follows the form and guesses has half of the yes-and-no answers right. Small models follow no
form, so "bits" says how surprising the right answer is.
"""

import json
import math
import re
import time
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from evaluation.asking import Answerer, Scoring, Writing, Written
from evaluation.own.outcomes import Record, figures_of, fingerprint, outcome, too_long
from evaluation.own.questions import Asker, said, scores_of, texts_of
from evaluation.own.words import ADJECTIVES, CITIES, NAMES, NOUNS
from evaluation.task import Options, Outcome

_EACH = 12
"""Questions of each form."""
_MOST = 48
"""New tokens at most."""


class Form(NamedTuple):
    """A form of answers."""

    name: str
    draw: Callable[[Random, int], tuple[str, str]]
    """Question and answer by their number; the answer continues the question."""
    stop: str
    has_form: Callable[[str, str], bool]
    """Whether a text has the form that the right answer has; both without blanks around them."""
    equals: Callable[[str, str], bool]
    """Whether it says the same as the right answer, whose form it has."""


def _json(rng: Random, number: int) -> tuple[str, str]:
    name, age, city = rng.choice(NAMES), rng.randrange(18, 90), rng.choice(CITIES)
    answer = json.dumps({"name": name, "age": age, "city": city})
    return f"Text: {name} is {age} years old and lives in {city}.\nJSON:", f" {answer}"


def _bullets(rng: Random, number: int) -> tuple[str, str]:
    items = [f"{rng.choice(ADJECTIVES)} {noun}" for noun in rng.sample(NOUNS, 2 + number % 3)]
    asked = f"{', '.join(items[:-1])} and {items[-1]}"
    return f"Items: {asked}\nList:", "".join(f"\n- {item}" for item in items)


def _yes_no(rng: Random, number: int) -> tuple[str, str]:
    small, large = sorted(rng.sample(range(1, 100), 2))
    is_so = number % 2 == 0
    first, second = (large, small) if is_so else (small, large)
    return f"Question: Is {first} greater than {second}?\nAnswer:", " yes" if is_so else " no"


def _has_keys(text: str, right: str) -> bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() == json.loads(right).keys()


FORMS = (
    Form("json", _json, "\n", _has_keys, lambda text, right: json.loads(text) == json.loads(right)),
    Form("bullets", _bullets, "\n\n",
         lambda text, right: re.fullmatch(r"- \S.*(\n- \S.*)*", text) is not None
         and text.count("\n") == right.count("\n"),
         str.__eq__),
    Form("yes_no", _yes_no, "\n", lambda text, right: text in ("yes", "no"), str.__eq__),
)  # fmt: skip


class Formatted(NamedTuple):
    """A question."""

    form: Form
    text: str
    answer: str


def questions(num_fewshot: int, seed: int) -> list[Formatted]:
    """All questions, one of each form in turn.

    Args:
        num_fewshot: examples before each.
        seed: by which these are drawn.
    """
    found = []
    for number in range(_EACH):
        for form in FORMS:
            examples = Random(f"format example {form.name} {number} {seed}")
            shown = ["{}{}\n\n".format(*form.draw(examples, number + 1 + one)) for one in range(num_fewshot)]
            question, answer = form.draw(Random(f"format {form.name} {number}"), number)
            found.append(Formatted(form, "".join(shown) + question, answer))
    return found


class FormatTask:
    name, version = "zero_format", "1"
    needs_writing, runs_code = True, False
    takes_examples = True

    def run(self, answerer: Answerer, options: Options) -> Outcome:
        """
        Raises:
            ValueError: the questions are to be put by a chat template, and the model has none.
        """
        begun = time.monotonic()
        num_fewshot = 2 if options.num_fewshot is None else options.num_fewshot
        asker = Asker(answerer, options, "Answer the last question in the form of the examples, and say nothing else.")
        made = questions(num_fewshot, options.seed)
        samples: list[Record] = []
        asked: list[tuple[Record, Formatted, Scoring, Writing]] = []
        for one in made[: options.limit]:
            samples.append({"form": one.form.name, "question": one.text, "right": one.answer.strip()})
            writing = asker.writing(one.text, _MOST, (one.form.stop,))
            scorings = asker.scorings(one.text, [one.answer], is_whole=True)
            if scorings and writing:
                asked.append((samples[-1], one, scorings[0], writing))
            else:
                samples[-1]["left_out"] = too_long(answerer.context)
        for (sample, *_), score in zip(asked, scores_of(answerer, [scoring for *_, scoring, _ in asked])):
            sample["bits"] = -score.logprob / math.log(2)
        for (sample, one, *_), written in zip(asked, texts_of(answerer, [writing for *_, writing in asked])):
            has_form = follows(one.form, written, sample["right"])
            is_right = has_form and one.form.equals(said(written.text), sample["right"])
            sample |= {"written": written.text, "format": float(has_form), "correct": float(is_right)}
        figures = figures_of(samples, "format", "form") | figures_of(samples, "correct", "form")
        figures |= figures_of(samples, "bits", "form", higher_is_better=False)
        data = fingerprint([[one.form.name, one.text, one.answer] for one in made])
        return outcome(self, options, begun, figures, samples, data, num_fewshot=num_fewshot, seed=options.seed)


def follows(form: Form, written: Written, right: str) -> bool:
    """Whether a text has the form of the right answer, and ends."""
    return written.has_ended and form.has_form(said(written.text), right)

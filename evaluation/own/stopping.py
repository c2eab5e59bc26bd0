"""zero_stopping: whether the model ends by itself once a text is complete.

Each text is scored whole and cut in its middle. "acc" is the share in which the end is likelier after the whole text;
"end_probability" and "early_end_probability" are the chances of an end there. "ends" is the share of texts that the
model, left to write, ends within the limit. A text to continue ends by the token for the end of a document, and is
given whole; in a conversation, the model answers a question itself, and each token that ends an answer counts.
"""

import math
import time
from typing import NamedTuple

from evaluation.asking import Answerer, Scoring, Writing
from evaluation.own.completion import questions as functions
from evaluation.own.outcomes import Record, figures_of, fingerprint, outcome, too_long
from evaluation.own.questions import answering, fits, scores_of, texts_of
from evaluation.task import Options, Outcome
from tokenizer import Tokenizer
from tokenizer.chat_template import Message, template_of

_MOST = 96
"""New tokens at most."""
_LISTS = (
    ("List the days of a working week.", "1. Monday\n2. Tuesday\n3. Wednesday\n4. Thursday\n5. Friday"),
    ("List the first six letters of the alphabet.", "- a\n- b\n- c\n- d\n- e\n- f"),
    ("List the four seasons.", "1. spring\n2. summer\n3. autumn\n4. winter"),
    ("Count from one to eight.", "one, two, three, four, five, six, seven, eight."),
    ("List the primary colors.", "- red\n- yellow\n- blue"),
    ("List the first five even numbers.", "1. 2\n2. 4\n3. 6\n4. 8\n5. 10"),
    ("List the vowels.", "a, e, i, o, u."),
    ("List the months of spring.", "- March\n- April\n- May"),
)
_ANSWERS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What do bees make?", "Bees make honey from the nectar of flowers."),
    ("When does water freeze?", "Water freezes at zero degrees Celsius, at the usual pressure of the air."),
    ("Why is it dark at night?", "At night, our side of the earth is turned away from the sun."),
    ("What is a triangle?", "A triangle is a shape with three straight sides and three corners."),
    ("Which month comes after May?", "June comes after May."),
    ("What is the opposite of cold?", "The opposite of cold is warm."),
)
_FUNCTIONS = ("factorial", "fibonacci", "running_sums", "double", "is_even", "to_celsius", "greet", "clamp")


class Ending(NamedTuple):
    """A question with its complete answer."""

    kind: str
    question: str
    answer: str

    @property
    def document(self) -> str:
        """The text to continue."""
        if self.kind == "function":
            return self.answer + "\n"
        return f"{self.question}\n\n{self.answer}\n"

    @property
    def half(self) -> str:
        """The answer's first half, which ends within a word or before one."""
        return self.answer[: len(self.answer) // 2].rstrip()


def questions() -> list[Ending]:
    """All texts, one of each kind in turn."""
    sources = {one.name: one.header + one.body.rstrip("\n") for one in functions()}
    asked = [f"Write the Python function {name} with a docstring. Answer with the source alone." for name in _FUNCTIONS]
    found = []
    for one, other, question, name in zip(_LISTS, _ANSWERS, asked, _FUNCTIONS):
        found += [Ending("list", *one), Ending("answer", *other), Ending("function", question, sources[name])]
    return found


class StoppingTask:
    name, version = "zero_stopping", "1"
    needs_writing = runs_code = False
    takes_examples = False

    def run(self, answerer: Answerer, options: Options) -> Outcome:
        """
        Raises:
            ValueError: the questions are to be put by a chat template, and the model has none.
        """
        begun = time.monotonic()
        lay_out = in_conversation if options.chat else as_document
        made = questions()
        samples: list[Record] = []
        asked: list[tuple[Record, list[Scoring], Writing]] = []
        for one in made[: options.limit]:
            samples.append({"kind": one.kind, "question": one.question, "answer": one.answer})
            scorings, writing = lay_out(answerer.tokenizer, one, options)
            if all(fits(scoring, answerer.context) for scoring in scorings) and (
                len(writing.prompt) + writing.most <= answerer.context
            ):
                asked.append((samples[-1], scorings, writing))
            else:
                samples[-1]["left_out"] = too_long(answerer.context)
        scores = iter(scores_of(answerer, [scoring for _, scorings, _ in asked for scoring in scorings]))
        for sample, scorings, _ in asked:
            chances = [math.exp(next(scores).logprob) for _ in scorings]
            whole, early = sum(chances[::2]), sum(chances[1::2])
            sample |= {"end_probability": whole, "early_end_probability": early, "acc": _more(whole, early)}
        if answerer.can_write:
            for (sample, *_), written in zip(asked, texts_of(answerer, [writing for *_, writing in asked])):
                sample |= {"written": written.text, "ends": float(written.has_ended)}
        figures = (
            figures_of(samples, "acc", "kind") | figures_of(samples, "ends", "kind")
            | figures_of(samples, "end_probability", "kind")
            | figures_of(samples, "early_end_probability", higher_is_better=False)
        )  # fmt: skip
        return outcome(self, options, begun, figures, samples, fingerprint([list(one) for one in made]),
                       chance={"acc": 0.5}, most_tokens=_MOST)  # fmt: skip


def as_document(tokenizer: Tokenizer, one: Ending, options: Options) -> tuple[list[Scoring], Writing]:
    """The end after the whole text and after its first half, and what is written after the whole."""
    half = one.document[: one.document.index(one.answer)] + one.half
    whole, cut = ((*tokenizer.begin_ids, *tokenizer.encode(text)) for text in (one.document, half))
    end = (tokenizer.eod_id,)
    return [Scoring(whole, end), Scoring(cut, end)], Writing(whole, _MOST)


def in_conversation(tokenizer: Tokenizer, one: Ending, options: Options) -> tuple[list[Scoring], Writing]:
    """Each end after the whole answer and after its first half, in turn, and the answer that is written.

    Raises:
        ValueError: there is no chat template.
    """
    template = template_of(tokenizer)
    system = [Message("system", options.system)] if options.system else []
    asked = [*system, Message("user", one.question)]
    contexts = []
    for answer in (one.answer, one.half):
        rendered = template.render([*asked, Message("assistant", answer)])
        # The last token that is learnt is the end.
        end = len(rendered.supervised) - 1 - rendered.supervised[::-1].index(True)
        contexts.append(tuple(rendered.ids[:end]))
    scorings = [Scoring(context, (stop,)) for stop in sorted(template.stop_ids) for context in contexts]
    return scorings, answering(template, asked, _MOST)


def _more(first: float, second: float) -> float:
    """1 if the first is larger, a half if they are equal: a model that says the same everywhere is right by chance."""
    return 1.0 if first > second else 0.5 if first == second else 0.0

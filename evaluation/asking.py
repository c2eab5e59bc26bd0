"""What an evaluation asks of a model, and what it is answered. Plain data, without torch.

    a task -> Scoring, Scoring, ...  -> Answerer -> Score, Score, ...    -> the task's figures
              Writing, Writing, ...              -> Written, ...

Tasks (own/, harness.py) know nothing of how a model computes, and models (answering.py, training/evaluation.py) nothing
of tasks. In between stands journal.py, which keeps each answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tokenizer import Tokenizer


@dataclass(frozen=True)
class Scoring:
    """How likely is a text after another one?"""

    context: tuple[int, ...]
    """Tokens that are given: at least one."""
    continuation: tuple[int, ...]
    """Tokens whose probability is wanted: at least one. Both together fit into the model's context, but for the last
    token, which need not be read."""


class Score(NamedTuple):
    """The answer to a Scoring."""

    logprob: float
    """Natural logarithm of the continuation's probability: the sum over its tokens."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one in its place."""


@dataclass(frozen=True)
class Writing:
    """How does a text go on?"""

    prompt: tuple[int, ...]
    """At least one token; with `most` more of them it fits into the model's context."""
    most: int
    """New tokens at most."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are not part of it. The model's own stop tokens end it, too."""
    stop_ids: tuple[int, ...] = ()
    """Further tokens that end it: those of a chat template, which a model's folder need not name."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    """By which the answer is drawn, if the temperature is above 0: several answers to one prompt have several seeds."""


class Written(NamedTuple):
    """The answer to a Writing."""

    text: str
    has_ended: bool
    """Whether it ended by itself, not at `most`."""


class Answerer(Protocol):
    """A model that answers."""

    tokenizer: Tokenizer
    context: int
    """Positions that the model knows."""
    can_write: bool
    """Whether it answers a Writing: a model that is cut over the ranks of a training run does not."""

    def score(self, asked: Sequence[Scoring]) -> Iterator[tuple[int, Score]]:
        """(Place in `asked`, answer) of each, in the order in which they are found."""

    def write(self, asked: Sequence[Writing]) -> Iterator[tuple[int, Written]]:
        """The same for texts. Each is that of its own prompt and seed, whoever else is asked."""

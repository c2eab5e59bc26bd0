"""What is asked of the engine, and what it answers. Plain data, without torch.

    Request -> engine.py -> Piece, Piece, ..., the last one with `finish`

A request asks for one continuation of a prompt, or for several. Each has a number, its `choice`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Finish = Literal["stop", "length", "cancelled", "error"]
"""Why a text ended: by a stop token or a stop string; at its limit or the end of the model's context; because nobody
wants it any more; by a fault of ours, or of the model's numbers."""


@dataclass(frozen=True)
class Sampling:
    """How each next token is chosen, and when the text ends.

    The order is that of transformers: penalties and bias change the scores, then temperature, top_k, top_p and min_p.
    """

    max_new_tokens: int | None = None
    """None: as many as the model's context has room for. 0: the prompt's own log-probabilities alone."""
    min_new_tokens: int = 0
    """Before so many tokens, no stop token is chosen."""
    temperature: float = 1.0
    """Divides the scores; 0 takes the highest score."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities reach this sum (Holtzman et al., 2020)."""
    min_p: float = 0.0
    """Draw from tokens that are at least this many times as likely as the likeliest one (Nguyen et al., 2024)."""
    repetition_penalty: float = 1.0
    """Scores of tokens in prompt and text are divided by it where positive, multiplied where negative (Keskar et al.,
    "CTRL", 2019)."""
    presence_penalty: float = 0.0
    """Taken from the score of each token that the text has."""
    frequency_penalty: float = 0.0
    """Taken from the score of each token once for each time that the text has it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> what is added to its score."""
    seed: int | None = None
    """Same seed, same text, whoever else is served; None: another text each time."""
    logprobs: int | None = None
    """Number of alternatives whose log-probabilities are told with each token's own; None: none are told. They are
    those of the model itself, before anything above changes them."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are not part of it."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end it, besides the folder's own."""
    ignores_eos: bool = False
    """Whether the folder's own stop tokens are tokens like others."""
    includes_stop: bool = False
    """Whether a stop string is part of the answer."""
    num_beams: int = 1
    """Texts that a beam search follows. Above 1, pieces come at its end."""
    length_penalty: float = 1.0
    """Beam search divides a text's log-probability by its length to this power."""
    early_stopping: bool | Literal["never"] = False
    """When a beam search ends: as soon as it has enough finished texts; by an estimate that better ones are unlikely;
    or never before it is certain. As in transformers."""


@dataclass(frozen=True)
class Request:
    """A prompt, and what is wanted of it."""

    id: str
    """Unique among the requests that the engine has."""
    prompt_ids: tuple[int, ...]
    sampling: Sampling = Sampling()
    n: int = 1
    """Number of choices."""
    adapter: str | None = None
    """Name of the adapter that answers; None: the model without one, or with the one that stays in it."""
    continuations: tuple[tuple[int, ...], ...] = ()
    """Texts whose log-probabilities after the prompt are wanted. Then nothing is written, and `sampling` does not
    count: choice i tells the tokens of continuation i, each with the likeliest one in its place, in one piece."""


class TokenScore(NamedTuple):
    """A token of a text."""

    id: int
    logprob: float | None = None
    """Natural logarithm of its probability; None if it was not asked for, and for the first token of a prompt."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place and their log-probabilities, in falling order."""


class Piece(NamedTuple):
    """What one step adds to a text."""

    request: str
    choice: int
    text: str = ""
    """Whole characters. What may be the beginning of a stop string waits until it is none."""
    tokens: tuple[TokenScore, ...] = ()
    """Tokens whose text ends in this piece, in order."""
    finish: Finish | None = None
    """With the last piece of a choice."""
    prompt: tuple[TokenScore, ...] = ()
    """The prompt's tokens, if their log-probabilities were asked for: with the first piece."""
    error: str = ""
    """With finish "error": a sentence that says what happened."""
    cached_tokens: int = 0
    """With the last piece: tokens of the prompt that did not have to be computed."""


class EngineStats(NamedTuple):
    """What an engine does, for /metrics and logs. Counts since its start, and the present state."""

    running: int
    waiting: int
    blocks: int
    """Blocks of the cache, and those of them that a request uses."""
    used_blocks: int
    prompt_tokens: int
    cached_tokens: int
    """Tokens of prompts that were found in the cache."""
    new_tokens: int
    preemptions: int
    steps: int

"""What all APIs share of an answer: reading the fields that say how it is drawn, and gathering its pieces.

    JSON -> Job: requests for the engine -> pieces -> JSON, whole or as events
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.catalog import Offer
from serving.fields import Field, Mistake, biases, boolean, ids, number, one_of, stops, whole
from serving.limits import Limits
from serving.requests import Finish, Piece, Request, Sampling, TokenScore
from serving.text import Lead

_LARGEST = 1 << 24
"""Beyond every context."""
MOST_ALTERNATIVES = 20
MOST_STOPS, _LONGEST_STOP = 16, 1000
_LOWEST = -9999.0
"""What stands for the logarithm of 0, which JSON cannot hold."""

LOCAL_FIELDS: dict[str, Field] = {
    "top_k": Field(whole(-1, _LARGEST), 0),
    "min_p": Field(number(0, 1), 0.0),
    "repetition_penalty": Field(number(0.01, 100), 1.0),
    "ignore_eos": Field(boolean, False),
    "min_tokens": Field(whole(0, _LARGEST), 0),
    "stop_token_ids": Field(ids(1024), ()),
    "include_stop_str_in_output": Field(boolean, False),
    "prompt_logprobs": Field(whole(0, MOST_ALTERNATIVES)),
    "num_beams": Field(whole(1, _LARGEST), 1),
    "length_penalty": Field(number(-100, 100), 1.0),
    "early_stopping": Field(lambda value: value if type(value) is bool else one_of("true", "false", "never")(value),
                            False),
    "return_token_ids": Field(boolean, False),
    "return_timings": Field(boolean, False),
}  # fmt: skip
"""Fields that OpenAI's API does not have. Most are called as in vLLM, those of beam search as in transformers."""
DRAWING_FIELDS: dict[str, Field] = {
    "temperature": Field(number(0, 100), 1.0),
    "top_p": Field(number(0, 1, above=True), 1.0),
    "n": Field(whole(1, 1024), 1),
    "stop": Field(stops(MOST_STOPS, _LONGEST_STOP), ()),
    "seed": Field(whole(-(1 << 63), (1 << 63) - 1)),
    "presence_penalty": Field(number(-2, 2), 0.0),
    "frequency_penalty": Field(number(-2, 2), 0.0),
    "logit_bias": Field(biases(1024), {}),
}


def sampling_of(values: Mapping[str, Any], offer: Offer, limits: Limits, **more: Any) -> Sampling:
    """How an answer is drawn, of the values of both tables above.

    Args:
        limits: the server's.
        more: fields of Sampling that an endpoint sets itself.
    Raises:
        Mistake: values contradict each other, ask for too much, or name tokens that the model does not have.
    """
    offer.require_ids(values["stop_token_ids"], "stop_token_ids")
    offer.require_ids(list(values["logit_bias"]), "logit_bias")
    if values["num_beams"] > limits.max_beams:
        raise Mistake(f"num_beams is {values['num_beams']}, and this server takes {limits.max_beams} at most "
                      f"(--max_beams): ask for fewer", "num_beams")  # fmt: skip
    if values["num_beams"] == 1:
        for name in ("length_penalty", "early_stopping"):
            if values[name] != LOCAL_FIELDS[name].default:
                raise Mistake(f"{name} has no effect without num_beams: leave it out", name)
    elif values["n"] > values["num_beams"]:
        raise Mistake("n must not be more than num_beams, since each text needs a beam", "n")
    return Sampling(**{
        "min_new_tokens": values["min_tokens"], "temperature": values["temperature"], "top_k": max(values["top_k"], 0),
        "top_p": values["top_p"], "min_p": values["min_p"], "repetition_penalty": values["repetition_penalty"],
        "presence_penalty": values["presence_penalty"], "frequency_penalty": values["frequency_penalty"],
        "logit_bias": values["logit_bias"], "seed": values["seed"], "stop": values["stop"],
        "stop_ids": frozenset(values["stop_token_ids"]), "ignores_eos": values["ignore_eos"],
        "includes_stop": values["include_stop_str_in_output"], "prompt_logprobs": values["prompt_logprobs"],
        "num_beams": values["num_beams"], "length_penalty": values["length_penalty"],
        "early_stopping": {"true": True, "false": False}.get(values["early_stopping"], values["early_stopping"]),
        **more,
    })  # fmt: skip


def fit(offer: Offer, prompt: Sequence[int], wanted: int | None, usual: int | None, name: str, field: str) -> int:
    """Number of tokens that an answer may have.

    Args:
        wanted: that the request asks for; None: as many as `usual`, or as there is room for.
        name: the request's field for it.
        field: the request's field for the prompt.
    Raises:
        Mistake: the prompt is empty, or the context has no room for both.
    """
    room = offer.context - len(prompt)
    if not prompt:
        raise Mistake(f"{field} is empty: give the model something to continue", field)
    if room < (1 if wanted != 0 else 0):
        raise Mistake(f"{field} has {len(prompt)} tokens, and the model has room for {offer.context}, with the answer: "
                      f"shorten it", field, "context_length_exceeded")  # fmt: skip
    if wanted is None:
        return room if usual is None else min(usual, room)
    if wanted > room:
        raise Mistake(f"{field} has {len(prompt)} tokens, which leave room for {room} of the {wanted} of {name}: the "
                      f"model knows {offer.context} positions", name, "context_length_exceeded")  # fmt: skip
    return wanted


def finite(logprob: float | None) -> float | None:
    """A log-probability for JSON."""
    if logprob is None or math.isnan(logprob):
        return None
    return max(logprob, _LOWEST)


@dataclass
class Choice:
    """One text of an answer, as far as it has come."""

    index: int
    """Its number in the answer."""
    request: int
    """Number of its prompt."""
    lead: Lead
    """What takes that text away which the model says before every answer."""
    text: str = ""
    tokens: list[TokenScore] = field(default_factory=list)
    finish: Finish | None = None
    error: str = ""
    cached_tokens: int = 0
    is_told: bool = False
    """Whether a part of it has left as an event."""

    def add(self, piece: Piece) -> str:
        """Take a piece; returns what it adds to the text."""
        self.tokens += piece.tokens
        new = self.lead.push(piece.text)
        if piece.finish is not None:
            new += self.lead.flush()
        self.text += new
        if piece.finish is not None:
            self.finish, self.error, self.cached_tokens = piece.finish, piece.error, piece.cached_tokens
        return new


class Job(ABC):
    """A request for texts, and how its answer is told.

    Args:
        requests: for the engine; their choices are numbered through.
        is_stream: whether the answer is told in events.
        lead: text that the model says before every answer, and that is not part of it.
    """

    event_prefix = b"data: "
    event_end = b"data: [DONE]\n\n"

    def __init__(self, offer: Offer, requests: Sequence[Request], is_stream: bool, lead: str = ""):
        self.offer, self.requests, self.is_stream = offer, tuple(requests), is_stream
        self.created = int(time.time())
        self.prompt_scores: list[tuple[TokenScore, ...]] = [()] * len(self.requests)
        """Log-probabilities of each prompt's tokens, once they are known."""
        self.choices: dict[tuple[str, int], Choice] = {}
        self.began = time.monotonic()
        self.first_token_at: float | None = None
        self.last_token_at = self.began
        for place, request in enumerate(self.requests):
            for choice in range(request.n):
                self.choices[request.id, choice] = Choice(len(self.choices), place, Lead(lead))

    def add(self, piece: Piece) -> list[dict]:
        """Take a piece; returns the events that tell it, if the answer is a stream."""
        choice = self.choices[piece.request, piece.choice]
        if choice.finish is not None:
            return []
        if piece.prompt:
            self.prompt_scores[choice.request] = piece.prompt
        if piece.tokens:
            self.last_token_at = time.monotonic()
            self.first_token_at = self.first_token_at or self.last_token_at
        before = len(choice.text)
        text = choice.add(piece)
        return self.events(choice, piece, text, before) if self.is_stream else []

    @property
    def num_new_tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices.values())

    @property
    def timings(self) -> dict:
        """Seconds from the request's arrival, and tokens a second after the first one."""
        first, last = self.first_token_at, self.last_token_at
        speed = None
        if first is not None and last > first:
            speed = (self.num_new_tokens - 1) / (last - first)
        return {
            "first_token_s": None if first is None else first - self.began, "total_s": last - self.began,
            "tokens_per_second": speed,
        }  # fmt: skip

    @property
    def usage(self) -> dict:
        prompt = sum(len(request.prompt_ids) for request in self.requests)
        cached = {choice.request: choice.cached_tokens for choice in reversed(self.choices.values())}
        return {
            "prompt_tokens": prompt, "completion_tokens": self.num_new_tokens,
            "total_tokens": prompt + self.num_new_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }  # fmt: skip

    @abstractmethod
    def first(self) -> list[dict]:
        """Events that tell that the request is accepted."""

    @abstractmethod
    def events(self, choice: Choice, piece: Piece, text: str, before: int) -> list[dict]:
        """Events that tell a piece.

        Args:
            text: what it adds to the choice's text.
            before: length of the text before it.
        """

    @abstractmethod
    def last(self) -> list[dict]:
        """Events after all pieces."""

    @abstractmethod
    def whole(self) -> dict:
        """The answer in one."""

"""OpenAI's API: chat completions and completions, with some of vLLM's additions. Their fields are in openai_fields.py.
"""

import uuid
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from serving.answers import Choice, Job, finite, fit, sampling_of
from serving.catalog import Catalog, Offer
from serving.fields import Mistake, take
from serving.limits import Limits
from serving.openai_fields import (
    CHAT_FIELDS,
    CHAT_OFF,
    COMPLETION_FIELDS,
    COMPLETION_OFF,
    DETOKENIZE_FIELDS,
    TOKENIZE_FIELDS,
    TOKENIZE_OFF,
    prompts_of,
)
from serving.requests import Piece, Request, TokenScore
from serving.token_texts import TokenTexts


def _require(values: Mapping[str, Any], name: str) -> Any:
    if values[name] is None:
        raise Mistake(f"{name} is missing", name, "missing_parameter")
    return values[name]


def _require_choices(limits: Limits, prompts: int, n: int) -> None:
    if prompts * n > limits.max_choices:
        raise Mistake(f"a request may ask for {limits.max_choices} texts at most, got {prompts * n}", "n")


def logprob_entries(tokens: Sequence[TokenScore], texts: TokenTexts, top: int, with_ids: bool) -> list[dict]:
    """Tokens of an answer as chat completions tell them.

    Args:
        top: most alternatives of each.
    """

    def entry(token_id: int, logprob: float | None) -> dict:
        shown = texts.alone(token_id)
        # Bytes that are no whole character cannot be told.
        data = None if "\ufffd" in shown else list(shown.encode("utf-8", "surrogatepass"))
        found = {"token": shown, "logprob": finite(logprob), "bytes": data}
        return found | {"id": token_id} if with_ids else found

    return [
        entry(token.id, token.logprob) | {"top_logprobs": [entry(*one) for one in token.alternatives[:top]]}
        for token in tokens
    ]


def prompt_entries(scores: Sequence[TokenScore], texts: TokenTexts) -> list[dict | None]:
    """Tokens of a prompt as vLLM's prompt_logprobs tell them: id -> what is known of it, for the token and its
    alternatives."""
    found: list[dict | None] = []
    for token in scores:
        if token.logprob is None:
            found.append(None)
            continue
        # vLLM counts ranks from 1; that of a token beyond the alternatives is not known.
        ranked = {one: (logprob, rank) for rank, (one, logprob) in enumerate(token.alternatives, 1)}
        ranked.setdefault(token.id, (token.logprob, None))
        found.append({
            str(one): {"logprob": finite(logprob), "rank": rank, "decoded_token": texts.alone(one)}
            for one, (logprob, rank) in ranked.items()
        })  # fmt: skip
    return found


class _OpenAIJob(Job):
    """What both endpoints share."""

    object_name, chunk_name = "", ""

    def __init__(
        self, values: dict[str, Any], offer: Offer, fingerprint: str | None, requests: Sequence[Request], lead: str = ""
    ):
        super().__init__(offer, requests, values["stream"], lead)
        if values["stream_options"] is not None and not self.is_stream:
            raise Mistake("stream_options has no effect without stream: leave it out", "stream_options")
        if self.is_stream and values["prompt_logprobs"] is not None:
            raise Mistake("prompt_logprobs cannot be streamed: leave out stream", "prompt_logprobs")
        self._values, self._fingerprint = values, fingerprint
        self._id = requests[0].id.rpartition("-")[0]
        self._has_usage = (values["stream_options"] or {}).get("include_usage", False)

    def _head(self, name: str) -> dict:
        return {
            "id": self._id, "object": name, "created": self.created, "model": self.offer.name,
            "system_fingerprint": self._fingerprint,
        }  # fmt: skip

    def _chunk(self, *choices: dict, **more: Any) -> dict:
        usage = {"usage": None} if self._has_usage else {}
        return self._head(self.chunk_name) | {"choices": list(choices)} | usage | more

    def last(self) -> list[dict]:
        more = {"usage": self.usage} if self._has_usage else {}
        if self._values["return_timings"]:
            more["timings"] = self.timings
        return [self._chunk(**more)] if more else []

    def whole(self) -> dict:
        choices = [self._choice(choice) for choice in self.choices.values()]
        answer = self._head(self.object_name) | {"choices": choices, "usage": self.usage}
        return answer | ({"timings": self.timings} if self._values["return_timings"] else {})

    def _choice(self, choice: Choice) -> dict:
        raise NotImplementedError

    def _ids(self, tokens: Sequence[TokenScore]) -> dict:
        return {"token_ids": [token.id for token in tokens]} if self._values["return_token_ids"] else {}


class Chat(_OpenAIJob):
    """POST /v1/chat/completions"""

    object_name, chunk_name = "chat.completion", "chat.completion.chunk"

    @classmethod
    def read(cls, body: Mapping[str, Any], catalog: Catalog, fingerprint: str | None, limits: Limits) -> "Chat":
        """
        Raises:
            Mistake: the request cannot be answered.
        """
        values = take(body, CHAT_FIELDS, CHAT_OFF)
        offer = catalog.find(values["model"])
        prompt = offer.conversation(_require(values, "messages"))
        _require_choices(limits, 1, values["n"])
        name = "max_tokens" if values["max_completion_tokens"] is None else "max_completion_tokens"
        if values["max_tokens"] is not None and values[name] != values["max_tokens"]:
            raise Mistake("max_tokens and max_completion_tokens mean the same: give one of them", "max_tokens")
        if values["top_logprobs"] and not values["logprobs"]:
            raise Mistake("top_logprobs needs logprobs: true", "top_logprobs")
        assert offer.template is not None
        top = values["top_logprobs"] or 0
        ends = frozenset() if values["ignore_eos"] else offer.template.stop_ids
        sampling = sampling_of(
            values, offer, limits, max_new_tokens=fit(offer, prompt, values[name], None, name, "messages"),
            stop_ids=ends | frozenset(values["stop_token_ids"]), logprobs=top if values["logprobs"] else None,
        )  # fmt: skip
        request = Request(f"chatcmpl-{uuid.uuid4().hex}-0", prompt, sampling, values["n"], offer.adapter)
        return cls(values, offer, fingerprint, [request], offer.template.lead)

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        prompt = self.requests[0].prompt_ids
        self._of_prompt: dict[str, Any] = {}
        """What a learner wants to know of the prompt."""
        if self._values["return_token_ids"]:
            self._of_prompt["prompt_token_ids"] = list(prompt)
        if self._values["show_prompt"]:
            self._of_prompt["prompt"] = [token._asdict() for token in self.offer.texts.shown(prompt)]

    def _logprobs(self, tokens: Sequence[TokenScore]) -> dict | None:
        if not self._values["logprobs"]:
            return None
        with_ids = self._values["return_token_ids"]
        top = self._values["top_logprobs"] or 0
        return {"content": logprob_entries(tokens, self.offer.texts, top, with_ids), "refusal": None}

    def first(self) -> list[dict]:
        delta = {"role": "assistant", "content": ""}
        chunks = [
            self._chunk({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None})
            for choice in self.choices.values()
        ]
        return [chunks[0] | self._of_prompt, *chunks[1:]]

    def events(self, choice: Choice, piece: Piece, text: str, before: int) -> list[dict]:
        if not text and not piece.tokens and piece.finish is None:
            return []
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        return [self._chunk({
            "index": choice.index, "delta": {"content": text} if text else {}, "logprobs": logprobs,
            "finish_reason": piece.finish,
        } | self._ids(piece.tokens))]  # fmt: skip

    def _choice(self, choice: Choice) -> dict:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {
            "index": choice.index, "message": message, "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish,
        } | self._ids(choice.tokens)  # fmt: skip

    def whole(self) -> dict:
        answer = super().whole() | self._of_prompt
        if self._values["prompt_logprobs"] is not None:
            answer["prompt_logprobs"] = prompt_entries(self.prompt_scores[0], self.offer.texts)
        return answer


class Completion(_OpenAIJob):
    """POST /v1/completions"""

    object_name, chunk_name = "text_completion", "text_completion"

    def __init__(self, *arguments: Any, prompts: Sequence[str]):
        super().__init__(*arguments)
        self._prompts = prompts
        """Texts of the prompts, for `echo`."""
        self._offsets: list[list[int]] = []
        """Where the text of each of their tokens begins."""
        if self._values["echo"] and self._values["logprobs"] is not None:
            for request in self.requests:
                lengths = [len(token.text) for token in self.offer.texts.shown(request.prompt_ids)]
                self._offsets.append([0, *accumulate(lengths)][: len(lengths)])

    @classmethod
    def read(cls, body: Mapping[str, Any], catalog: Catalog, fingerprint: str | None, limits: Limits) -> "Completion":
        """
        Raises:
            Mistake: the request cannot be answered.
        """
        values = take(body, COMPLETION_FIELDS, COMPLETION_OFF)
        offer = catalog.find(values["model"])
        prompts = prompts_of(_require(values, "prompt"), limits.max_prompts)
        _require_choices(limits, len(prompts), values["n"])
        if values["best_of"] not in (None, values["n"]):
            raise Mistake("best_of is not supported by this server, except as many as n: leave it out", "best_of",
                          "unsupported_parameter")  # fmt: skip
        name, requests, texts = f"cmpl-{uuid.uuid4().hex}", [], []
        for number, prompt in enumerate(prompts):
            field = "prompt" if len(prompts) == 1 else f"prompt[{number}]"
            if isinstance(prompt, str):
                ids = offer.text(prompt, values["add_special_tokens"], field)
            else:
                ids = tuple(prompt)
                offer.require_ids(ids, field)
            of_prompt = values["logprobs"] if values["echo"] else None
            sampling = sampling_of(
                values, offer, limits, max_new_tokens=fit(offer, ids, values["max_tokens"], 16, "max_tokens", field),
                logprobs=values["logprobs"],
                prompt_logprobs=max((one for one in (of_prompt, values["prompt_logprobs"]) if one is not None),
                                    default=None),
            )  # fmt: skip
            requests.append(Request(f"{name}-{number}", ids, sampling, values["n"], offer.adapter))
            texts.append(offer.tokenizer.decode(ids) if values["echo"] else "")
        return cls(values, offer, fingerprint, requests, prompts=texts)

    def first(self) -> list[dict]:
        return []

    def events(self, choice: Choice, piece: Piece, text: str, before: int) -> list[dict]:
        if not text and not piece.tokens and piece.finish is None:
            return []
        echo = self._values["echo"] and not choice.is_told
        choice.is_told = True
        return [self._chunk(self._told(choice, text, piece.tokens, before, echo) | {"finish_reason": piece.finish})]

    def _choice(self, choice: Choice) -> dict:
        told = self._told(choice, choice.text, choice.tokens, 0, self._values["echo"])
        if self._values["prompt_logprobs"] is not None:
            told["prompt_logprobs"] = prompt_entries(self.prompt_scores[choice.request], self.offer.texts)
        return told | {"finish_reason": choice.finish}

    def _told(self, choice: Choice, text: str, tokens: Sequence[TokenScore], before: int, echo: bool) -> dict:
        """A part of a text.

        Args:
            before: characters of the text before it.
            echo: the prompt comes first.
        """
        prompt = self._prompts[choice.request] if self._values["echo"] else ""
        told: dict[str, Any] = {"index": choice.index, "text": prompt + text if echo else text, "logprobs": None}
        if self._values["logprobs"] is not None:
            told["logprobs"] = self._logprobs(choice, tokens, len(prompt) + before, echo)
        if self._values["return_token_ids"]:
            told["token_ids"] = [token.id for token in tokens]
            told["prompt_token_ids"] = list(self.requests[choice.request].prompt_ids) if echo or not before else None
        return told

    def _logprobs(self, choice: Choice, tokens: Sequence[TokenScore], begin: int, echo: bool) -> dict:
        """Tokens in four lists.

        Args:
            begin: characters before `tokens`.
        """
        texts, top = self.offer.texts, self._values["logprobs"]
        prompt = self.prompt_scores[choice.request] if echo else ()
        offsets = list(self._offsets[choice.request]) if echo else []

        def name(token_id: int) -> str:
            # Two tokens that are parts of characters would have the same name.
            shown = texts.alone(token_id)
            return f"token_id:{token_id}" if "\ufffd" in shown else shown

        position = begin
        for token in tokens:
            offsets.append(position)
            shown = texts.alone(token.id)
            position += 0 if "\ufffd" in shown else len(shown)
        both = [*prompt, *tokens]
        return {
            "tokens": [name(token.id) for token in both],
            "token_logprobs": [finite(token.logprob) for token in both],
            "top_logprobs": [
                None if token.logprob is None else
                {name(one): finite(logprob) for one, logprob in reversed((*token.alternatives[:top],
                                                                          (token.id, token.logprob)))}
                for token in both
            ],
            "text_offset": offsets,
        }  # fmt: skip


def tokenize(body: Mapping[str, Any], catalog: Catalog) -> dict:
    """POST /tokenize, as vLLM's: the tokens of a text, or of a conversation that asks for an answer.

    Raises:
        Mistake: the request cannot be answered.
    """
    values = take(body, TOKENIZE_FIELDS, TOKENIZE_OFF)
    offer = catalog.find(values["model"])
    if (values["prompt"] is None) == (values["messages"] is None):
        raise Mistake("give either prompt or messages", "prompt")
    if values["messages"] is not None:
        ids = offer.conversation(values["messages"])
    else:
        ids = offer.text(values["prompt"], values["add_special_tokens"])
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": offer.context, "tokens": list(ids)}
    if values["return_token_strs"]:
        answer["token_strs"] = [offer.texts.alone(one) for one in ids]
    if values["show_prompt"]:
        answer["prompt"] = [token._asdict() for token in offer.texts.shown(ids)]
    return answer


def detokenize(body: Mapping[str, Any], catalog: Catalog) -> dict:
    """POST /detokenize, as vLLM's.

    Raises:
        Mistake: the request cannot be answered.
    """
    values = take(body, DETOKENIZE_FIELDS, {})
    offer = catalog.find(values["model"])
    found = _require(values, "tokens")
    if not isinstance(found, list) or not all(type(one) is int for one in found):
        raise Mistake("tokens must be a list of token ids", "tokens", "invalid_value")
    offer.require_ids(found, "tokens")
    return {"prompt": offer.tokenizer.decode(found)}


def models(catalog: Catalog) -> dict:
    """GET /v1/models"""
    return {"object": "list", "data": [model(offer) for offer in catalog.offers]}


def model(offer: Offer) -> dict:
    """GET /v1/models/NAME"""
    return {
        "id": offer.name, "object": "model", "created": offer.created, "owned_by": "zero2all",
        "max_model_len": offer.context, "parent": offer.parent, "step": offer.step,
        "chat": offer.template is not None, "notes": offer.notes, "recommended": dict(offer.recommended),
    }  # fmt: skip


"""The API of Hugging Face's Text Generation Inference: /generate and /generate_stream.

One thing differs: a token that ends a text is not part of it here, so `details` does not count it.
"""

import secrets
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from serving.answers import DRAWING_FIELDS, MOST_ALTERNATIVES, MOST_STOPS, Choice, Job, finite, fit
from serving.catalog import Catalog, Offer
from serving.fields import Field, Mistake, boolean, number, stops, take, text, whole
from serving.limits import Limits
from serving.requests import Piece, Request, Sampling, TokenScore

_LARGEST = 1 << 24
_USUAL_NEW_TOKENS = 100
GENERATE_FIELDS: dict[str, Field] = {
    "inputs": Field(text),
    "parameters": Field(lambda value: _parameters(value)),
    # As of TGI's route `/`, to which some clients send everything.
    "stream": Field(boolean, False),
}
PARAMETERS: dict[str, Field] = {
    "max_new_tokens": Field(whole(1, _LARGEST)),
    "do_sample": Field(boolean, False),
    "temperature": Field(number(0, 100, above=True)),
    "top_k": Field(whole(1, _LARGEST)),
    "top_p": Field(number(0, 1, above=True)),
    "repetition_penalty": Field(number(0.01, 100), 1.0),
    "frequency_penalty": DRAWING_FIELDS["frequency_penalty"],
    "stop": Field(stops(MOST_STOPS, 1000), ()),
    "seed": Field(whole(0, (1 << 63) - 1)),
    "details": Field(boolean, False),
    "decoder_input_details": Field(boolean, False),
    "top_n_tokens": Field(whole(0, MOST_ALTERNATIVES), 0),
    "return_full_text": Field(boolean, False),
    "adapter_id": Field(text),
}
OFF: dict[str, tuple] = {
    "best_of": (1,), "typical_p": (1, 1.0), "truncate": (), "watermark": (False,), "grammar": (),
}  # fmt: skip


def _parameters(value: Any) -> dict:
    if not isinstance(value, dict):
        raise ValueError("an object")
    return take(value, PARAMETERS, OFF, "parameters.")


class Generate(Job):
    """POST /generate and /generate_stream"""

    event_prefix, event_end = b"data:", b""

    def __init__(self, values: Mapping[str, Any], inputs: str, offer: Offer, request: Request, is_stream: bool):
        super().__init__(offer, [request], is_stream)
        self._values, self._inputs, self._count = values, inputs, 0

    @classmethod
    def read(
        cls, body: Mapping[str, Any], catalog: Catalog, fingerprint: str | None, limits: Limits,
        is_stream: bool = False,
    ) -> "Generate":  # fmt: skip
        """
        Args:
            is_stream: the route says so.
        Raises:
            Mistake: the request cannot be answered.
        """
        whole_body = take(body, GENERATE_FIELDS, {})
        values = whole_body["parameters"] or take({}, PARAMETERS, OFF)
        if whole_body["inputs"] is None:
            raise Mistake("inputs is missing", "inputs", "missing_parameter")
        is_stream = is_stream or whole_body["stream"]
        if is_stream and values["decoder_input_details"]:
            raise Mistake("decoder_input_details cannot be streamed", "parameters.decoder_input_details")
        offer = catalog.find(values["adapter_id"])
        prompt = offer.text(whole_body["inputs"], field="inputs")
        # As in TGI, whoever says how to draw wants to draw.
        draws = values["do_sample"] or any(values[name] is not None for name in ("temperature", "top_k", "top_p"))
        seed = values["seed"] if values["seed"] is not None or not draws else secrets.randbits(63)
        has_details = is_stream or values["details"] or values["decoder_input_details"]
        sampling = Sampling(
            max_new_tokens=fit(offer, prompt, values["max_new_tokens"], _USUAL_NEW_TOKENS, "max_new_tokens", "inputs"),
            temperature=(1.0 if values["temperature"] is None else values["temperature"]) if draws else 0.0,
            top_k=values["top_k"] or 0, top_p=1.0 if values["top_p"] is None else values["top_p"],
            repetition_penalty=values["repetition_penalty"], frequency_penalty=values["frequency_penalty"], seed=seed,
            stop=values["stop"], includes_stop=True, logprobs=values["top_n_tokens"] if has_details else None,
            prompt_logprobs=0 if values["decoder_input_details"] else None,
        )  # fmt: skip
        request = Request(f"tgi-{uuid.uuid4().hex}-0", prompt, sampling, 1, offer.adapter)
        return cls(values, whole_body["inputs"], offer, request, is_stream)

    def first(self) -> list[dict]:
        return []

    def _token(self, token_id: int, logprob: float | None) -> dict:
        texts = self.offer.texts
        return {"id": token_id, "text": texts.alone(token_id), "logprob": finite(logprob),
                "special": texts.is_control(token_id)}  # fmt: skip

    def _alternatives(self, token: TokenScore) -> list[dict]:
        return [self._token(*one) for one in token.alternatives[: self._values["top_n_tokens"]]]

    def events(self, choice: Choice, piece: Piece, text: str, before: int) -> list[dict]:
        told = []
        tokens: Sequence[TokenScore] = piece.tokens
        for place, token in enumerate(tokens, 1):
            self._count += 1
            # What clients join is the tokens' text, so it is that of whole characters.
            part = text if place == len(tokens) else ""
            told.append({"index": self._count, "token": self._token(token.id, token.logprob) | {"text": part}}
                        | ({"top_tokens": self._alternatives(token)} if self._values["top_n_tokens"] else {})
                        | {"generated_text": None, "details": None})  # fmt: skip
        if piece.finish is not None:
            if not told:
                # TGI's last event has a token: here it is the one that ends the text.
                end = {"id": self.offer.tokenizer.eod_id, "text": text, "logprob": None, "special": True}
                told.append({"index": self._count + 1, "token": end})
            request = self.requests[0]
            ends = {"finish_reason": self._reason(choice), "generated_tokens": len(choice.tokens),
                    "seed": request.sampling.seed, "input_length": len(request.prompt_ids)}  # fmt: skip
            told[-1] |= {"generated_text": self._text(choice), "details": ends}
        return told

    def last(self) -> list[dict]:
        return []

    def whole(self) -> dict:
        choice = next(iter(self.choices.values()))
        answer: dict[str, Any] = {"generated_text": self._text(choice)}
        if self._values["details"] or self._values["decoder_input_details"]:
            prompt = self.prompt_scores[0] if self._values["decoder_input_details"] else ()
            answer["details"] = {
                "finish_reason": self._reason(choice), "generated_tokens": len(choice.tokens),
                "seed": self.requests[0].sampling.seed,
                "prefill": [{"id": one.id, "text": self.offer.texts.alone(one.id), "logprob": finite(one.logprob)}
                            for one in prompt],
                "tokens": [self._token(token.id, token.logprob) for token in choice.tokens],
            } | ({"top_tokens": [self._alternatives(token) for token in choice.tokens]}
                 if self._values["top_n_tokens"] else {})  # fmt: skip
        return answer

    def _text(self, choice: Choice) -> str:
        return self._inputs + choice.text if self._values["return_full_text"] else choice.text

    def _reason(self, choice: Choice) -> str | None:
        if choice.finish != "stop":
            return choice.finish
        return "stop_sequence" if any(choice.text.endswith(one) for one in self._values["stop"]) else "eos_token"

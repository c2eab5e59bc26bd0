"""Answers to the prompts of a command: printed as they are drawn, one below the other, or as JSON lines."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from serving.local import Asked, pieces_of
from serving.prompts import Prompt
from serving.requests import Finish, Piece, Request, Sampling, TokenScore
from serving.terminal import tell
from serving.text import without_lead
from tokenizer import Tokenizer
from tokenizer.chat_template import template_of


class Asking(NamedTuple):
    """A prompt as the engine gets it."""

    prompt: Prompt
    request: Request
    lead: str
    """Text before every answer that is not part of it."""


@dataclass
class Answer:
    """One choice."""

    text: str = ""
    tokens: list[TokenScore] = field(default_factory=list)
    finish: Finish | None = None
    error: str = ""

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish, self.error = piece.finish, piece.error


def asking(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, context: int, sampling: Sampling, n: int, adapter: str | None
) -> list[Asking]:
    """What the engine is asked.

    Args:
        context: positions that the model knows.
        n: texts for each prompt.
    Raises:
        ValueError: a prompt leaves no room for a text.
    """
    asked = [
        _asking(str(number), prompt, tokenizer, context, sampling, n, adapter) for number, prompt in enumerate(prompts)
    ]
    wanted = sampling.max_new_tokens
    rooms = [context - len(one.request.prompt_ids) for one in asked]
    less = [number for number, room in enumerate(rooms) if wanted is not None and room < wanted]
    if less:
        first = asked[less[0]]
        others = f" (and {len(less) - 1} more)" if len(less) > 1 else ""
        tell(f"{first.prompt.where}{others}: {len(first.request.prompt_ids)} tokens of prompt leave room for "
             f"{rooms[less[0]]} of --max_new_tokens {wanted}: the model knows {context} positions")  # fmt: skip
    return asked


def _asking(
    name: str, prompt: Prompt, tokenizer: Tokenizer, context: int, sampling: Sampling, n: int, adapter: str | None
) -> Asking:  # fmt: skip
    if prompt.messages:
        template = template_of(tokenizer)
        ids, lead = template.prompt(prompt.messages), template.lead
        sampling = replace(sampling, stop_ids=sampling.stop_ids | template.stop_ids)
    else:
        # Begins as with transformers' tokenizer of the same folder. A chat template writes its own beginning.
        ids, lead = [*tokenizer.begin_ids, *tokenizer.encode(prompt.text)], ""
    if len(ids) >= context:
        raise ValueError(
            f"{prompt.where}: the prompt has {len(ids)} tokens, and the model knows {context} positions "
            f"(max_position_embeddings): shorten it"
        )
    room = context - len(ids)
    if sampling.max_new_tokens is not None:
        sampling = replace(sampling, max_new_tokens=min(room, sampling.max_new_tokens))
    return Asking(prompt, Request(name, tuple(ids), sampling, n, adapter), lead)


def complete(engine: Asked, asked: Sequence[Asking], tokenizer: Tokenizer, as_json: bool) -> int:
    """Print all texts, in the order of the prompts; returns the exit code. A single text appears as it is drawn.

    Raises:
        KeyboardInterrupt: the user wants no more.
    """
    if len(asked) == 1 and asked[0].request.n == 1 and not as_json:
        answers = [_print_alone(engine, asked[0])]
        _print_table(answers[0], tokenizer)
        return _tell_errors(answers)
    code = 0
    for number, (one, answers) in enumerate(_answered(engine, asked)):
        if as_json:
            print(json.dumps(_record(one, answers, tokenizer), ensure_ascii=False), flush=True)
        else:
            for choice, answer in enumerate(answers):
                title = [f"{number + 1} of {len(asked)}"] if len(asked) > 1 else []
                title += [f"text {choice + 1} of {len(answers)}"] if len(answers) > 1 else []
                print(f"--- {', '.join(title)}\n{_begin(one)}{answer.text}", flush=True)
                _print_table(answer, tokenizer)
        code = max(code, _tell_errors(answers))
    return code


def _begin(asked: Asking) -> str:
    """What stands before a text: its prompt, unless it answers a question."""
    return "" if asked.prompt.messages else asked.prompt.text


def _print_alone(engine: Asked, asked: Asking) -> Answer:
    answer = Answer()

    def texts() -> Iterator[str]:
        for piece in pieces_of(engine, [asked.request]):
            answer.add(piece)
            yield piece.text

    print(_begin(asked), end="", flush=True)
    try:
        for text in without_lead(texts(), asked.lead):
            print(text, end="", flush=True)
    finally:
        print(flush=True)
    return answer


def _answered(engine: Asked, asked: Sequence[Asking]) -> Iterator[tuple[Asking, list[Answer]]]:
    """Each prompt with its texts, as soon as these and those of all prompts before it have ended."""
    answers = {one.request.id: [Answer() for _ in range(one.request.n)] for one in asked}
    waiting = iter(asked)
    first = next(waiting, None)
    for piece in pieces_of(engine, [one.request for one in asked]):
        answers[piece.request][piece.choice].add(piece)
        while first is not None and all(answer.finish for answer in answers[first.request.id]):
            found = answers.pop(first.request.id)
            for answer in found:
                answer.text = "".join(without_lead(iter([answer.text]), first.lead))
            yield first, found
            first = next(waiting, None)


def _record(asked: Asking, answers: list[Answer], tokenizer: Tokenizer) -> dict[str, object]:
    """A line of --json: the prompt's own record, and the texts."""
    choices = []
    for answer in answers:
        choice: dict[str, object] = {"text": answer.text, "finish_reason": answer.finish}
        if answer.error:
            choice["error"] = answer.error
        if any(token.logprob is not None for token in answer.tokens):
            choice["logprobs"] = [
                {"id": token.id, "token": tokenizer.decode([token.id]), "logprob": token.logprob, "top": [
                    {"id": other, "token": tokenizer.decode([other]), "logprob": logprob}
                    for other, logprob in token.alternatives
                ]}
                for token in answer.tokens
            ]  # fmt: skip
        choices.append(choice)
    return {**asked.prompt.fields, "choices": choices}


def _print_table(answer: Answer, tokenizer: Tokenizer) -> None:
    """Tokens with their probabilities, and the likeliest in their places; nothing if they were not asked for."""
    if all(token.logprob is None for token in answer.tokens):
        return

    def shown(token_id: int) -> str:
        return json.dumps(tokenizer.decode([token_id]), ensure_ascii=False)

    print(f"\n{'token':20} {'log p':>8}  likeliest")
    for token in answer.tokens:
        others = "  ".join(f"{shown(other)} {logprob:.3f}" for other, logprob in token.alternatives)
        logprob = "" if token.logprob is None else f"{token.logprob:.3f}"
        print(f"{shown(token.id):20} {logprob:>8}  {others}".rstrip(), flush=True)


def _tell_errors(answers: list[Answer]) -> int:
    """Exit code after these texts; what went wrong is said."""
    for answer in answers:
        if answer.finish == "error":
            tell(answer.error)
    return 1 if any(answer.finish == "error" for answer in answers) else 0

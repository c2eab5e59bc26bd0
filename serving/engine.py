"""An engine that answers many requests at once.

    submit -> scheduler: StepPlan -> runner: scores -> sampling: tokens -> text: pieces -> step returns them
                  ^                                        |
                  +---- tokens, forks, ends ---------------+

Nothing runs but inside `step`. The caller repeats it while there is work, in one thread; service.py does so for a
server.
"""

import logging
import math
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from model.rope import length_group
from serving.admission import EngineOptions, limit_of, width_of
from serving.beams import BeamSearch
from serving.cache import Blocks
from serving.continuations import Continuation, texts_of
from serving.failures import works
from serving.invariant import InvariantRunner
from serving.loading import Served, Speech
from serving.plan import StepPlan
from serving.pool import num_blocks_of
from serving.requests import EngineStats, Finish, Piece, Request, Sampling, TokenScore
from serving.rows import RowState
from serving.runner import Runner
from serving.sampling import NO_TOKEN, check, continuation_scores, sample, token_scores
from serving.scheduler import Planned, Scheduler, Sequence, Unit
from serving.text import TextStream

logger = logging.getLogger(__name__)

_NOT_NUMBERS = (
    "the model's scores are not finite numbers (NaN or infinity), so there is no next token: its weights may be "
    "damaged, or its numbers too large for its dtype"
)


class Runs(Protocol):
    """What the engine needs of a Runner."""

    def run(self, plan: StepPlan) -> Tensor:
        """Scores of the wanted tokens, float32 (R, V): V is the model's vocabulary."""


@dataclass(eq=False)
class _Choice:
    """A text that is being written, or that stands after the prompt and is to be scored."""

    number: int
    state: RowState
    stream: TextStream
    has_spoken: bool = False
    continuation: Continuation | None = None


@dataclass(eq=False)
class _Answer:
    """A request that has not ended.

    Args:
        units: what the scheduler runs for it, and the choices that come of each. At first, one unit computes the prompt
            for all.
        search: what chooses the tokens, if the texts are those of a beam search.
        prompt: the prompt's tokens, as far as their log-probabilities were asked for and computed.
    """

    request: Request
    units: dict[Unit, list[_Choice]]
    search: BeamSearch | None = None
    num_cached: int = -1
    prompt: list[TokenScore] = field(default_factory=list)

    @property
    def lacks_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are wanted and missing."""
        wanted = self.request.sampling.prompt_logprobs is not None
        return wanted and len(self.prompt) < len(self.request.prompt_ids)


class Engine:
    """An engine.

    Args:
        served: the model.
        runner: what computes its steps; None: a Runner of this process alone.
    Raises:
        ValueError: the options do not fit together, or there is too little memory.
    """

    def __init__(self, served: Served, options: EngineOptions, runner: Runs | None = None):
        options.check()
        self.served, self.options = served, options
        self.context = served.model.config.max_position_embeddings
        parameter = next(served.model.parameters())
        count = num_blocks_of(served.model.config, options, parameter.dtype, parameter.device)
        if runner is None:
            kind = InvariantRunner if options.batch_invariant else Runner
            runner = kind(served, count, options.block_size, parameter.dtype, parameter.device)
        self._runner = runner
        self._blocks = Blocks(count, options.block_size, options.prefix_sharing)
        most = max(options.tokens_a_step, options.max_running)
        self._scheduler = Scheduler(self._blocks, options.max_running, most, options.scores_a_step)
        self._open: dict[str, _Answer] = {}
        self._answers: dict[Unit, _Answer] = {}
        self._outbox: list[Piece] = []
        self._num_arrived = 0
        self._prompt_tokens = self._cached_tokens = self._new_tokens = self._steps = 0
        self._device = parameter.device
        self.has_lost_device = False
        """Whether the device has failed for good: every further step would fail."""

    @property
    def has_work(self) -> bool:
        return bool(self._open or self._outbox)

    def submit(self, request: Request) -> None:
        """Take a request. Its pieces come out of the steps that follow.

        Raises:
            ValueError: it can never be served, or its id is in use.
        """
        if request.id in self._open:
            raise ValueError(f"there is a request {request.id} already: give each its own id")
        speech = self.served.speech_of(request.adapter)
        if request.continuations:
            self._submit_continuations(request, speech)
            return
        sampling, prompt_ids = request.sampling, request.prompt_ids
        check(sampling, speech.tokenizer.vocab_size, request.n)
        limit = limit_of(
            request, speech.tokenizer.vocab_size, self.context, self.options, self._blocks.count, self._scheduler.fits
        )
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        request = replace(request, sampling=replace(sampling, seed=seed))
        stop_ids = sampling.stop_ids | (frozenset() if sampling.ignores_eos else speech.stop_ids)
        unit = Unit(
            (self._num_arrived, 0), [Sequence(list(prompt_ids))], limit, width_of(request), request.adapter,
            None if sampling.prompt_logprobs is None else 0, sampling.num_beams > 1, prompt_length=len(prompt_ids),
            group=length_group(self.served.model.config, len(prompt_ids)),
        )  # fmt: skip
        search = None
        if sampling.num_beams > 1 and limit > len(prompt_ids):
            search = BeamSearch(sampling, seed, prompt_ids, stop_ids, limit - len(prompt_ids))
        choices = [
            _Choice(number, RowState(sampling, seed, number, prompt_ids, stop_ids),
                    TextStream(speech.tokenizer, sampling.stop, sampling.includes_stop))
            for number in range(request.n)
        ]  # fmt: skip
        self._num_arrived += 1
        self._open[request.id] = self._answers[unit] = _Answer(request, {unit: choices}, search)
        self._scheduler.add(unit)

    def _submit_continuations(self, request: Request, speech: Speech) -> None:
        """Take a request that asks for log-probabilities of texts after its prompt.

        Raises:
            ValueError: it can never be served.
        """
        prompt, config = request.prompt_ids, self.served.model.config
        if request.n != 1:
            raise ValueError(f"n must be 1 beside continuations, got {request.n}")
        if not all(request.continuations):
            raise ValueError("a continuation is empty: leave it out, its probability is 1")
        sampling = Sampling(max_new_tokens=0, seed=0)
        known = speech.tokenizer.vocab_size
        limits = [
            limit_of(
                Request(request.id, prompt + ids[:-1], sampling), known, self.context, self.options,
                self._blocks.count, self._scheduler.fits,
            )
            for ids in request.continuations
        ]  # fmt: skip
        if not all(0 <= ids[-1] < known for ids in request.continuations):
            raise ValueError(f"a continuation has tokens that the tokenizer does not know: it has 0 to {known - 1}")
        answer = self._open[request.id] = _Answer(request, {})
        for place, (text, numbers) in enumerate(texts_of(request.continuations)):
            # As if each of these were a prompt of its own: rotary angles may depend on a text's length.
            length = len(prompt) + len(text)
            unit = Unit(
                (self._num_arrived, place), [Sequence([*prompt, *text])], limits[numbers[0]], 1, request.adapter,
                len(prompt) - 1, prompt_length=length, group=length_group(config, length),
            )  # fmt: skip
            answer.units[unit] = [
                _Choice(number, RowState(sampling, 0), TextStream(speech.tokenizer),
                        continuation=Continuation(request.continuations[number], len(prompt)))
                for number in numbers
            ]  # fmt: skip
            self._answers[unit] = answer
            self._scheduler.add(unit)
        self._num_arrived += 1

    def cancel(self, request_id: str) -> None:
        """Drop a request, if it has not ended. Its blocks are free at once."""
        if request_id in self._open:
            for unit in list(self._open[request_id].units):
                self._outbox += self._end(unit, "cancelled")

    def step(self) -> list[Piece]:
        """Compute one forward pass, and return what it adds to the texts, and who was cancelled since the last one."""
        pieces, self._outbox = self._outbox, []
        planned = self._scheduler.plan()
        if planned is None:
            return pieces
        self._steps += 1
        try:
            self._read(planned, self._runner.run(planned.plan), pieces)
        except Exception as error:
            # Whatever it is, those who wait must hear of it, and all others are still served.
            logger.exception("a step of the engine failed")
            self._look_at_device()
            # All choices of a request end: those that have just got a unit of their own have no next token either.
            answers = {id(answer): answer for owner in planned.owners if (answer := self._answers.get(owner.unit))}
            for unit in [unit for answer in answers.values() for unit in answer.units]:
                pieces += self._end(unit, "error", _failed(error))
        return pieces

    def run(self, requests: Iterable[Request]) -> Iterator[Piece]:
        """Answer requests, and yield the pieces as they come.

        Raises:
            ValueError: one of them can never be served; none was begun then.
        """
        begun: set[str] = set()
        try:
            for request in requests:
                self.submit(request)
                begun.add(request.id)
            while self.has_work:
                yield from self.step()
        finally:
            for request_id in begun:
                self.cancel(request_id)
            self._outbox = [piece for piece in self._outbox if piece.request not in begun]

    def stats(self) -> EngineStats:
        """What it does, and what it has done."""
        running = {unit.arrival[0] for unit in self._scheduler.running}
        return EngineStats(
            running=len(running), waiting=len(self._open) - len(running), blocks=self._blocks.count,
            used_blocks=self._blocks.num_used, prompt_tokens=self._prompt_tokens, cached_tokens=self._cached_tokens,
            new_tokens=self._new_tokens, preemptions=self._scheduler.num_preemptions, steps=self._steps,
        )  # fmt: skip

    def _read(self, planned: Planned, scores_RV: Tensor, pieces: list[Piece]) -> None:
        """Add to `pieces` what follows from a step's scores."""
        lasts = [owner.is_last for owner in planned.owners]
        self._scheduler.computed(planned)
        drawing: list[tuple[Unit, _Choice]] = []
        rows: list[int] = []
        scored: list[tuple[Continuation, range]] = []
        done: list[Unit] = []
        searching: dict[Unit, list[int]] = {}
        end = 0
        for (unit, sequence, part), is_last in zip(planned.owners, lasts):
            begin, end = end, end + part.num_scores
            answer = self._answers[unit]
            self._count_prompt(answer, unit)
            if answer.request.continuations:
                # The row of the text's token number t is row t + shift.
                computed = part.start + len(part.tokens)
                shift = end - computed
                for choice in answer.units[unit]:
                    assert choice.continuation is not None
                    places = choice.continuation.rows(computed - part.num_scores, computed)
                    if places:
                        scored.append((choice.continuation, range(places.start + shift, places.stop + shift)))
                if is_last:
                    done.append(unit)
            elif answer.lacks_prompt and not self._read_prompt(answer, part.start, scores_RV[begin:end]):
                pieces += self._end(unit, "error", _NOT_NUMBERS)
            elif is_last and len(sequence.tokens) >= unit.limit:
                pieces += self._end(unit, "length")
            elif is_last and unit.is_search:
                searching.setdefault(unit, []).append(end - 1)
            elif is_last:
                for one, choice in self._divide(answer, unit):
                    drawing.append((one, choice))
                    rows.append(end - 1)
        if scored:
            _score(scores_RV, scored)
        for unit in done:
            pieces += self._alone(unit, partial(self._tell, unit))
        # What the model has beyond the tokenizer's vocabulary is never written.
        scores_RV = scores_RV[:, : self.served.speech_of(planned.plan.adapter).tokenizer.vocab_size]
        if drawing:
            tokens = sample(_rows_of(scores_RV, rows), [choice.state for _, choice in drawing])
            for (unit, choice), token in zip(drawing, tokens):
                pieces += self._alone(unit, partial(self._take, unit, choice, token))
        for unit, rows in searching.items():
            pieces += self._alone(unit, partial(self._search, unit, _rows_of(scores_RV, rows)))

    def _alone(self, unit: Unit, take: Callable[[], list[Piece]]) -> list[Piece]:
        """Pieces of one unit; a fault concerns nobody else."""
        try:
            return take()
        except Exception as error:
            # As for a step.
            logger.exception("the next token of a text failed")
            self._look_at_device()
            return self._end(unit, "error", _failed(error))

    def _look_at_device(self) -> None:
        if not works(self._device):
            self.has_lost_device = True

    def _count_prompt(self, answer: _Answer, unit: Unit) -> None:
        if answer.num_cached < 0:
            answer.num_cached = unit.num_cached
            self._prompt_tokens += len(answer.request.prompt_ids)
            self._cached_tokens += unit.num_cached

    def _read_prompt(self, answer: _Answer, start: int, scores_TV: Tensor) -> bool:
        """Note the log-probabilities of a prompt's tokens from the scores of those before them. Return whether they are
        numbers.

        Args:
            start: number of the token whose scores are the first.
        """
        ids, count = answer.request.prompt_ids, answer.request.sampling.prompt_logprobs or 0
        if not start:
            answer.prompt = [TokenScore(ids[0])]
        following = ids[start + 1 : start + 1 + len(scores_TV)]
        if not following:
            return True
        scores_TV = scores_TV[:, : self.served.speech_of(answer.request.adapter).tokenizer.vocab_size]
        new = token_scores(scores_TV[: len(following)], following, [count] * len(following))
        answer.prompt += new
        return not any(token.logprob is None or math.isnan(token.logprob) for token in new)

    def _divide(self, answer: _Answer, unit: Unit) -> list[tuple[Unit, _Choice]]:
        """Choices that the scores after a unit's last token belong to, each with a unit of its own from now on."""
        choices = answer.units[unit]
        units = [unit, *self._scheduler.fork(unit, len(choices))]
        for one, choice in zip(units, choices):
            answer.units[one] = [choice]
            self._answers[one] = answer
        return list(zip(units, choices))

    def _take(self, unit: Unit, choice: _Choice, token: TokenScore) -> list[Piece]:
        """What a text's next token brings."""
        if token.id == NO_TOKEN:
            return self._end(unit, "error", _NOT_NUMBERS)
        if token.id in choice.state.stop_ids:
            return self._end(unit, "stop")
        text, tokens, stopped = choice.stream.push(token)
        self._new_tokens += 1
        choice.state.push(token.id)
        sequence = unit.sequences[0]
        sequence.tokens.append(token.id)
        if stopped or len(sequence.tokens) == unit.limit:
            return self._end(unit, "stop" if stopped else "length", text=text, tokens=tokens)
        piece = self._piece(self._answers[unit], choice, text, tokens)
        return [piece] if text or tokens or piece.prompt else []

    def _tell(self, unit: Unit) -> list[Piece]:
        """The continuations that a unit has computed."""
        answer, pieces = self._answers[unit], []
        for choice in answer.units[unit]:
            assert choice.continuation is not None and len(choice.continuation.found) == len(choice.continuation.ids)
            told = tuple(choice.continuation.found)
            if any(token.logprob is None or math.isnan(token.logprob) for token in told):
                pieces.append(self._piece(answer, choice, "", ())._replace(finish="error", error=_NOT_NUMBERS))
            else:
                piece = self._piece(answer, choice, "", told)
                pieces.append(piece._replace(finish="length", cached_tokens=max(0, answer.num_cached)))
        self._drop(unit)
        return pieces

    def _search(self, unit: Unit, scores_BV: Tensor) -> list[Piece]:
        """What a step of a beam search brings: at its end, all texts."""
        answer = self._answers[unit]
        assert answer.search is not None
        try:
            parents, tokens, is_done = answer.search.advance(scores_BV)
        except FloatingPointError:
            return self._end(unit, "error", _NOT_NUMBERS)
        if not is_done:
            self._scheduler.select(unit, parents, tokens)
            return []
        pieces = []
        choices = answer.units[unit]
        for choice, found in zip(choices, answer.search.results(len(choices)), strict=True):
            new = [choice.stream.push(TokenScore(token_id)) for token_id in found.ids]
            self._new_tokens += len(new)
            text, told = "".join(one.text for one in new), tuple(token for one in new for token in one.tokens)
            pieces.append(self._last(answer, choice, "stop" if found.has_stopped else "length", "", text, told))
        self._drop(unit)
        return pieces

    def _end(
        self, unit: Unit, finish: Finish, error: str = "", text: str = "", tokens: tuple[TokenScore, ...] = ()
    ) -> list[Piece]:
        """Drop a unit; return the last pieces of its choices.

        Args:
            text, tokens: what its last token has brought.
        """
        answer = self._answers.get(unit)
        if answer is None:
            return []
        pieces = [self._last(answer, choice, finish, error, text, tokens) for choice in answer.units[unit]]
        self._drop(unit)
        return pieces

    def _drop(self, unit: Unit) -> None:
        self._scheduler.end(unit)
        answer = self._answers.pop(unit)
        del answer.units[unit]
        if not answer.units:
            del self._open[answer.request.id]

    def _last(
        self, answer: _Answer, choice: _Choice, finish: Finish, error: str, text: str, tokens: tuple[TokenScore, ...]
    ) -> Piece:
        """The last piece of a choice, with what its text still held back."""
        if finish in ("stop", "length"):
            rest = choice.stream.flush()
            text, tokens = text + rest.text, (*tokens, *rest.tokens)
            finish = "stop" if rest.stopped else finish
        piece = self._piece(answer, choice, text, tokens)
        return piece._replace(finish=finish, error=error, cached_tokens=max(0, answer.num_cached))

    def _piece(self, answer: _Answer, choice: _Choice, text: str, tokens: tuple[TokenScore, ...]) -> Piece:
        prompt = () if choice.has_spoken or answer.lacks_prompt else tuple(answer.prompt)
        choice.has_spoken = True
        return Piece(answer.request.id, choice.number, text, tokens, prompt=prompt)


def _score(scores_RV: Tensor, scored: Iterable[tuple[Continuation, range]]) -> None:
    """Add to continuations what these rows of a step's scores say of their next tokens."""
    scored = list(scored)
    ids: list[int] = []
    for continuation, rows in scored:
        begin = len(continuation.found)
        ids += continuation.ids[begin : begin + len(rows)]
    all_rows = [row for _, rows in scored for row in rows]
    places = {row: place for place, row in enumerate(sorted(set(all_rows)))}
    told = continuation_scores(_rows_of(scores_RV, list(places)), [places[row] for row in all_rows], ids)
    begin = 0
    for continuation, rows in scored:
        continuation.found += told[begin : begin + len(rows)]
        begin += len(rows)


def _rows_of(scores_RV: Tensor, rows: list[int]) -> Tensor:
    """Some rows, without a copy if they are all."""
    if rows == list(range(len(scores_RV))):
        return scores_RV
    return scores_RV[torch.tensor(rows, device=scores_RV.device)]


def _failed(error: Exception) -> str:
    return f"a step of the engine failed ({type(error).__name__}): the log says more"

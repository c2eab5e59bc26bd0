"""The ranks' common work on an evaluation, in rounds. Rank 0 leads, as it alone has the tasks:

    rank 0    message: a batch for each data rank | its own batch     | sums of all -> answers | message ...
    others    receive                             | their own batches | sums                   | receive ...

A message may also be empty, while rank 0 has nothing to ask, or tell the end. With each of them, the ranks agree on
whether any must stop. Batch i of a round goes to data rank i, and batches do not depend on the number of ranks. While
they write, which takes long, they also agree after each second.

An error in a batch is told to all ranks, and they go on together, unless ranks need each other in a forward pass: then
nobody knows how far the others have come, and the error ends the run.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from evaluation.asking import Score, Scoring, Writing, Written
from evaluation.forward import Cut, ScoringTask, collate, cut
from evaluation.live_writing import groups_of, write_texts
from parallel import DistContext
from serving.loading import Speech
from training.build import Built
from training.stopping import Stopping

_BEAT_S = 1.0
"""Time between signs of life."""
Message = dict[str, Any]


class _BrokenOff(Exception):
    """Texts are left unfinished, since a rank must stop or has failed."""


class BatchFailed(Exception):
    """A batch could not be computed on some rank; on all ranks."""


class EvalRounds:
    """One rank's part of an evaluation, within the context `open`."""

    def __init__(self, built: Built, stopping: Stopping):
        self._built, self._stopping, self._engine = built, stopping, built.engine
        self._context, self._mesh, self._model = built.context, built.mesh, built.model
        self._scoring, self._beaten = ScoringTask(built.model, built.export.vocab_size), 0.0
        tokenizer, ends = built.data.tokenizer, built.export.generation.eos_ids
        self._speech = Speech(tokenizer, frozenset([tokenizer.eod_id, *ends]), {})
        self.stopped = False
        """Whether any rank must stop. All ranks know it after the same message."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """Context in which the model is as for validation. Afterwards it is as before."""
        self._engine.settle()
        was_training = self._model.training
        self._model.eval()
        try:
            # Compiled blocks would be compiled again for every width.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._engine.end_forward()
            self._model.train(was_training)

    def score(self, asked: Sequence[Scoring]) -> Iterator[tuple[int, Score]]:
        """Rank 0: (place, score) of each request, up to the moment at which any rank must stop.

        Raises:
            ValueError: a request cannot be scored.
            BatchFailed: as `follow`.
        """
        batches = cut(asked, self._model.config.max_position_embeddings, self._context.device.type)
        for group in self._groups(batches):
            table = self._do(self._tell({"score": [self._told(batch, asked) for batch in group]}))
            places = [place for batch in group for place in batch.places]
            for place, (logprob, num_greedy) in zip(places, table):
                yield place, Score(logprob, num_greedy == len(asked[place].continuation))
            if self.stopped:
                return

    def write(self, asked: Sequence[Writing]) -> Iterator[tuple[int, Written]]:
        """Rank 0: (place, text) of each request. Raises as `score`."""
        for groups in self._groups(groups_of(len(asked), self._context.device.type)):
            texts = self._do(self._tell({"write": [[asdict(asked[place]) for place in group] for group in groups]}))
            places = [place for group in groups for place in group]
            for place, (text, has_ended) in zip(places, texts):
                yield place, Written(text, has_ended)
            if self.stopped:
                return

    def wait(self) -> None:
        """Rank 0: tell the others that there is nothing to do yet."""
        self._tell(None)

    def end(self, problem: str, stopped: bool) -> None:
        """Rank 0: tell the others that this is the end, what went wrong, and whether all must stop."""
        self._tell({"end": [problem, stopped]})

    def follow(self) -> tuple[str, bool]:
        """Other ranks: do as told; returns what `end` tells."""
        while True:
            message = self._tell(None)
            if "end" in message:
                problem, stopped = message["end"]
                return problem, stopped
            try:
                self._do(message)
            except BatchFailed:
                # Rank 0 tells what follows.
                pass

    def _groups(self, batches: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """The batches of each round."""
        size = self._mesh.data_size
        return (batches[first : first + size] for first in range(0, len(batches), size))

    @staticmethod
    def _told(batch: Cut, asked: Sequence[Scoring]) -> Message:
        rows = [[asked[place].context, asked[place].continuation] for place in batch.places]
        return {"rows": rows, "shape": [batch.rows, batch.width]}

    def _tell(self, message: Message | None) -> Message:
        """Rank 0's message, on every rank; {} for none. Collective."""
        self._beat()
        # All memory is taken before the others wait.
        content = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8) if message else None
        head = torch.tensor([len(content) if content is not None else 0, int(self._stopping.asked())])
        size, stop = self._context.all_sum(head).tolist()
        self.stopped |= bool(stop)
        if not size:
            return {}
        # The others bring zeros, so the sum is rank 0's.
        content = torch.zeros(size, dtype=torch.uint8) if content is None else content
        return json.loads(self._context.all_sum(content).numpy().tobytes())

    def _do(self, message: Message) -> list[list[Any]]:
        """Do this rank's part of a round, unless any rank must stop; returns the answers of all. Collective.

        Raises:
            BatchFailed: a rank could not; on all ranks.
        """
        if self.stopped:
            return []
        if "score" in message:
            return self._score_round(message["score"])
        return self._write_round(message["write"]) if "write" in message else []

    def _score_round(self, batches: Sequence[Message]) -> list[list[float]]:
        """Two sums for each row of all batches."""
        sizes = [len(batch["rows"]) for batch in batches]
        table = torch.zeros(sum(sizes) + 1, 2, dtype=torch.float64)
        index = self._mesh.data_rank
        if index < len(batches):
            first = sum(sizes[:index])
            problem = self._attempt(lambda: self._score_batch(batches[index], table[first : first + sizes[index]]))
            table[-1, 0] = problem is not None
        else:
            problem = None
            if self._engine.forward_is_collective:
                # Every rank does as many forward passes.
                self._score_batch(batches[index % len(batches)], None)
        *found, (num_failed, _) = self._context.all_sum(table).tolist()
        if num_failed:
            self._raise_problem(problem)
        return found

    def _score_batch(self, batch: Message, into: Tensor | None) -> None:
        asked = [Scoring(tuple(context), tuple(continuation)) for context, continuation in batch["rows"]]
        _, _, sums = self._engine.evaluate(collate(asked, *batch["shape"]), self._scoring)
        if into is not None:
            into += torch.stack([sums["logprobs"], sums["greedy"]], dim=1)[: len(asked)].cpu()

    def _write_round(self, groups: Sequence[Sequence[Message]]) -> list[list[Any]]:
        """(Text, whether it has ended) of each; none if they are broken off, since any rank must stop."""
        own: list[Written] = []
        problem, looks = None, _Looks(self._context, self._stopping, self._beat)
        if self._mesh.data_rank < len(groups):
            asked = [_writing_of(one) for one in groups[self._mesh.data_rank]]
            problem = self._attempt(lambda: own.extend(self._write(asked, looks)))
        looks.until_all_are_done(problem is not None)
        self.stopped |= looks.must_stop
        if looks.are_broken_off and not looks.num_failed:
            return []
        gathered = self._context.gather([problem, *own])
        if any(problem for problem, *_ in gathered):
            self._raise_problem(problem)
        return [answer for _, *answers in gathered for answer in answers]

    def _write(self, asked: Sequence[Writing], looks: "_Looks") -> list[Written]:
        with suppress(_BrokenOff):
            return write_texts(self._model, self._speech, asked, looks.after_step)
        return []

    def _attempt(self, work: Callable[[], None]) -> str | None:
        """Do work of this rank alone; returns what went wrong."""
        if self._engine.forward_is_collective and self._context.world_size > 1:
            work()
            return None
        try:
            work()
        except Exception as error:
            # Whatever it is, it must not cost the run. (Kept as text: an exception holds on to tensors.)
            return f"{type(error).__name__}: {error}"
        return None

    def _raise_problem(self, own: str | None) -> None:
        problems = enumerate(self._context.gather(own))
        rank, problem = next((rank, problem) for rank, problem in problems if problem)
        raise BatchFailed(f"{problem} (on rank {rank})" if self._context.world_size > 1 else problem)

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._beaten > _BEAT_S:
            self._beaten = now
            self._built.run_dir.heartbeat.beat("evaluate", self._built.progress.step)


def _writing_of(told: Message) -> Writing:
    lists = {name: tuple(told[name]) for name in ("prompt", "stop", "stop_ids")}
    return Writing(**told | lists)


class _Looks:
    """What ranks agree on, each second, while they write texts of different lengths: whether any still writes, has
    failed, or must stop. One that has nothing left goes on looking, and shows that it lives."""

    def __init__(self, context: DistContext, stopping: Stopping, beat: Callable[[], None]):
        self._context, self._stopping, self._beat, self._last = context, stopping, beat, time.monotonic()
        self.num_writing, self.num_failed, self.must_stop = 0, 0, False

    @property
    def are_broken_off(self) -> bool:
        """Whether ranks have left texts unfinished."""
        return self.num_writing > 0 and (self.must_stop or self.num_failed > 0)

    def after_step(self) -> None:
        """On a rank that writes. Collective from time to time.

        Raises:
            _BrokenOff: no rank must write any more.
        """
        if time.monotonic() - self._last > _BEAT_S:
            self._look(True, False)
            if self.are_broken_off:
                raise _BrokenOff

    def until_all_are_done(self, has_failed: bool) -> None:
        """On a rank that has written, has failed, or was broken off. Collective."""
        is_first = True
        while not self.are_broken_off and (is_first or self.num_writing):
            self._look(False, has_failed)
            is_first = False

    def _look(self, is_writing: bool, has_failed: bool) -> None:
        self._beat()
        mine = torch.tensor([int(is_writing), int(has_failed), int(self._stopping.asked())])
        self.num_writing, self.num_failed, stop = self._context.all_sum(mine).tolist()
        self.must_stop, self._last = bool(stop), time.monotonic()

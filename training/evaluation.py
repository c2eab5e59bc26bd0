"""Evaluations of a run's checkpoints, between steps.

    step N | save, settled | evaluation of step N, on all ranks (eval_rounds.py) | step N + 1

The save comes first, so an evaluation costs nothing but its time. An error in it is a warning. If it kills the run (the
kernel wants memory back), the resumed run tries it once more, beginning with the answers that are there, and after
another death goes on without it.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch

from evaluation.asking import Answerer
from evaluation.checks import options_of
from evaluation.config import as_flags_of_training
from evaluation.in_thread import Asked, Done, EvaluationThread
from evaluation.journal import Journal
from evaluation.running import evaluate
from evaluation.task import Outcome
from runs.reslog import ResLog
from training import report
from training.build import Built
from training.eval_folder import EvalFolder
from training.eval_rounds import BatchFailed, EvalRounds
from training.saves import is_due
from training.stopping import Stopping, Teller

logger = logging.getLogger("train")

_TICK_S = 0.5
"""The ranks meet at least this often."""
_PATIENCE_S = 1800.0
"""Time that tasks may take without a question: to read data, or to run programs."""
_LEAVE_S = 5.0
"""Time to wait for the end of a thread that was told to leave."""


class Evaluations:
    """Evaluations of a run. All ranks make the same calls in the same order.

    Args:
        reslog: the results' file, on the first rank alone.
        leave_out: told the seconds that are no training time.
    """

    def __init__(self, built: Built, reslog: ResLog | None, stopping: Stopping, leave_out: Callable[[float], None]):
        self._built, self._reslog, self._stopping, self._leave_out = built, reslog, stopping, leave_out
        self._config, self._waiting = built.config.evaluation, False
        # Of rank 0.
        self._folder: EvalFolder | None = None
        self._thread: EvaluationThread | None = None

    def are_due(self, finished: bool) -> bool:
        """Whether to evaluate after this step; stays true until `run`, in case the save has to wait."""
        if self._config.names:
            self._waiting |= finished or is_due(self._built.progress.step, self._config.eval_interval)
        return self._waiting

    def run(self, is_saved: bool) -> bool:
        """Evaluate the present weights, unless that was done before; returns False if any rank must stop.

        Args:
            is_saved: whether a checkpoint holds them.
        """
        self._waiting, started, context = False, time.perf_counter(), self._built.context
        begins, problem = context.decide_on_main(self._begin) if is_saved else (False, "it is not saved")
        stopped = False
        if begins:
            rounds = EvalRounds(self._built, self._stopping)
            with _same_random_numbers(context.device), rounds.open():
                problem, stopped = self._lead(rounds) if context.is_main else rounds.follow()
            if context.device.type == "cuda":
                # Give up the memory of shapes that no step has.
                torch.cuda.empty_cache()
        if problem:
            report.report_failed_evaluation(self._reslog, self._built.progress.step, problem)
        self._leave_out(time.perf_counter() - started)
        return not stopped

    def _begin(self) -> tuple[bool, str]:
        """On rank 0: whether to evaluate, and if not, the reason, if it is one to be told."""
        if self._thread is not None and self._thread.is_alive:
            return False, "the evaluation before this one still hangs"
        try:
            folder = self._folder = EvalFolder(self._built)
            if folder.has_ended:
                return False, ""
            if folder.deaths:
                folder.end()
                return False, f"the run has died {folder.deaths} times meanwhile"
            folder.begin()
        except (OSError, ValueError) as error:
            return False, str(error)
        return True, ""

    def _lead(self, rounds: EvalRounds) -> tuple[str, bool]:
        """Rank 0's part; returns what went wrong, and whether any rank must stop."""
        assert self._folder is not None
        folder, stopped = self._folder, False
        thread = self._thread = EvaluationThread(
            self._work, self._built.data.tokenizer, self._built.model.config.max_position_embeddings,
            can_write=not self._built.config.parallel.cut_by,
        )  # fmt: skip
        thread.start()
        try:
            problem = self._serve(thread, rounds)
            stopped = rounds.stopped and not problem
            folder.stop() if stopped else folder.end()
        except (BatchFailed, OSError, ValueError, MemoryError) as error:
            # Each comes between collectives.
            problem = _told(error)
            # A full disk takes no end, either, and the other ranks must hear of it all the same.
            with suppress(OSError):
                folder.end()
        rounds.end(problem, stopped)
        thread.leave(_LEAVE_S)
        return problem, stopped

    def _work(self, answerer: Answerer) -> Iterator[Outcome]:
        """What the thread does."""
        assert self._folder is not None
        journal = Journal(answerer, self._folder.path, self._folder.fingerprint)
        options = options_of(self._config, self._built.config.run.task.teaches_chat)
        try:
            yield from evaluate(self._config.names, journal, options)
        finally:
            journal.close()

    def _serve(self, thread: EvaluationThread, rounds: EvalRounds) -> str:
        """Answer the thread's questions until it ends or any rank must stop; returns what went wrong."""
        assert self._folder is not None
        step, heard = self._built.progress.step, time.monotonic()
        while not rounds.stopped:
            event = thread.next_event(_TICK_S)
            if event is None:
                if time.monotonic() - heard > _PATIENCE_S:
                    return f"its tasks have asked nothing for {_PATIENCE_S:.0f} s"
                rounds.wait()
                continue
            if isinstance(event, Done):
                return _told(event.error) if event.error is not None else ""
            if isinstance(event, Asked):
                teller, total = Teller(f"evaluating step {step}"), len(event.requests)
                answers = rounds.score(event.requests) if event.kind == "score" else rounds.write(event.requests)
                for number, answer in enumerate(answers, 1):
                    event.answers.put(answer)
                    teller.tell(number, total)
            elif self._folder.take(event):
                report.report_evaluation(self._reslog, step, event.result)
            heard = time.monotonic()
        return ""


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Context after which all generators are as before, whatever the tasks have set as a seed."""
    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    of_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if of_gpu is not None:
            torch.cuda.set_rng_state(of_gpu, device)


def _told(error: BaseException) -> str:
    """An error in one sentence; a user's mistake is one already."""
    if isinstance(error, (BatchFailed, OSError, ValueError)) and str(error):
        return as_flags_of_training(str(error))
    logger.info("an error in an evaluation:", exc_info=error)
    return ": ".join(filter(None, [type(error).__name__, str(error)]))

"""Small tasks for tests of evaluations during training, and what a plain loop on a checkpoint says of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from evaluation.asking import Answerer, Scoring, Writing
from evaluation.own import TASKS
from evaluation.results import TaskResult, mean_figure
from evaluation.task import Options, Outcome
from serving.generation import load_model

COUNT = 24


def requests(vocab_size: int, context: int, count: int = COUNT) -> list[Scoring]:
    """Each token after one context, of which one must be the likeliest; then random texts of all lengths, the longest
    as long as possible."""
    asked = [Scoring((5, 7, 3), (token,)) for token in range(vocab_size if count == COUNT else 0)]
    for number in range(count):
        rng = np.random.default_rng(number)
        length = context + 1 if number < 2 else int(rng.integers(2, context + 2))
        ids = tuple(rng.integers(0, vocab_size, length).tolist())
        begin = 1 if number == 0 else int(rng.integers(1, length))
        asked.append(Scoring(ids[:begin], ids[begin:]))
    return asked


class Scores:
    """Asks for scores, and keeps them as samples.

    Args:
        error: raised in place of the figures.
    """

    version, needs_writing, runs_code, takes_examples = "1", False, False, False

    def __init__(self, name: str = "zero_scores", error: BaseException | None = None):
        self.name, self.error = name, error

    def run(self, answerer: Answerer, options: Options) -> Outcome:
        # What no task should do to a run that goes on.
        torch.manual_seed(1)
        np.random.seed(1)
        asked = requests(answerer.tokenizer.vocab_size, answerer.context, options.limit or COUNT)
        found = sorted(answerer.score(asked))
        if self.error is not None:
            raise self.error
        samples = [{"logprob": score.logprob, "is_greedy": score.is_greedy} for _, score in found]
        figures = {
            "logprob": mean_figure([score.logprob for _, score in found]),
            "greedy": mean_figure([float(score.is_greedy) for _, score in found]),
        }
        return Outcome(TaskResult(self.name, figures, self.version, seconds=0.5), samples)


class Texts:
    """Lets the model write."""

    name, version, needs_writing, runs_code, takes_examples = "zero_texts", "1", True, False, False

    def run(self, answerer: Answerer, options: Options) -> Outcome:
        prompts = [one.context[:20] for one in requests(answerer.tokenizer.vocab_size, answerer.context, 3)]
        asked = [Writing(prompt, 6 + number) for number, prompt in enumerate(prompts)]
        found = [written for _, written in sorted(answerer.write(asked))]
        # Once more, up to the second character.
        stopped = [replace(one, stop=(written.text[1:2],)) for one, written in zip(asked, found) if written.text[1:2]]
        found += [written for _, written in sorted(answerer.write(stopped))]
        figures = {"ended": mean_figure([float(written.has_ended) for written in found])}
        return Outcome(TaskResult(self.name, figures), [written._asdict() for written in found])


class Programs(Scores):
    """Runs programs, or says so."""

    runs_code = True


@contextmanager
def registered(*tasks) -> Iterator[None]:
    """Context in which there are these tasks, too."""
    before = dict(TASKS)
    TASKS.update({task.name: task for task in tasks})
    try:
        yield
    finally:
        TASKS.clear()
        TASKS.update(before)


@torch.no_grad()
def plain_scores(checkpoint: Path, context: int, count: int = COUNT) -> list[tuple[float, bool]]:
    """Scores of `requests`, each by a forward pass of its own, in float64 after the logits."""
    model, tokenizer, _ = load_model(checkpoint, torch.device("cpu"), torch.float32)
    found = []
    for one in requests(tokenizer.vocab_size, context, count):
        ids = torch.tensor([one.context + one.continuation])
        logits = model.logits(model(ids[:, :-1]))[0, len(one.context) - 1 :].double()
        label = ids[0, len(one.context) :]
        logprobs = logits.log_softmax(-1)[torch.arange(len(label)), label]
        found.append((logprobs.sum().item(), bool((logits.argmax(-1) == label).all())))
    return found

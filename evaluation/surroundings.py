"""What lm-eval leaves as it was: random numbers, other people's output, and the functions that we replace for a while.

Training evaluates in its own process, and goes on afterwards as if nothing had happened.
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

_NOISE = (
    "is defined, but aggregation is not", "is defined, but higher_is_better is not", "but fewshot_split is None",
    "Custom kwargs can be passed", "using test_docs as fewshot_docs",
)  # fmt: skip
"""Parts of warnings that say what a task's file leaves to a default."""
_RESAMPLES = 1000
"""As many give a standard error within 3%."""


class _Noise(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(part in text for part in _NOISE)


@contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """While it lasts, an attribute of a module has another value."""
    old = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Afterwards, random numbers go on as if nothing had been drawn."""
    state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


@contextmanager
def quiet() -> Iterator[None]:
    """While it lasts, lm-eval and `datasets` show no bars, and only warnings that say something of the evaluation."""
    import datasets
    from lm_eval.api import metrics, task

    noise, loggers = _Noise(), [logging.getLogger(name) for name in ("lm_eval.api.task", "lm_eval.config.task")]
    had_bars = datasets.utils.logging.is_progress_bar_enabled()
    with ExitStack() as stack:
        stack.enter_context(replaced(task, "tqdm", _without_bar))
        stack.enter_context(replaced(metrics, "bootstrap_stderr", _bootstrap))
        for logger in loggers:
            logger.addFilter(noise)
            stack.callback(logger.removeFilter, noise)
        whole = logging.getLogger("lm_eval")
        stack.callback(whole.setLevel, whole.level)
        # What it does at each step; training would show that.
        whole.setLevel(logging.WARNING)
        if had_bars:
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        yield


def _without_bar(items: Any, **how: object) -> Any:
    return items


def _bootstrap(metric: Callable[[Sequence[Any]], float], values: Sequence[Any], iters: int) -> float:
    """Standard error by the bootstrap, without lm-eval's pool: processes that are forked from one with threads or with
    CUDA may hang."""
    draw = random.Random(0)
    found = [metric(draw.choices(values, k=len(values))) for _ in range(min(iters, _RESAMPLES))]
    return float(np.std(found, ddof=1))

"""Programs that a model wrote, as lm-eval's tasks score them: HumanEval, MBPP and whatever asks for "code_eval".

These tasks' modules fetch a scorer of that name from the hub when they are imported, which runs programs unprotected.
Here it is replaced by one of the same form that runs them in the sandbox; prompts, filters and the rest stay lm-eval's.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from evaluation import sandbox
from evaluation.surroundings import replaced

SCORER = "code_eval"
_outcomes: dict[str, sandbox.Outcome] = {}
"""Programs of the task that is being scored, and how they ended. Equal ones are run once."""


def pass_at_k(count: int, correct: int, k: int) -> float:
    """Probability that one of k programs passes, if `correct` of `count` do (Chen et al., 2021: "Evaluating large
    language models trained on code"): 1 - C(n-c, k) / C(n, k).

    Raises:
        ValueError: there are fewer than k programs.
    """
    if count < k:
        raise ValueError(f"pass@{k} needs {k} programs for each problem, and there are {count}")
    return 1.0 - math.comb(count - correct, k) / math.comb(count, k)


class CodeEval:
    """The scorer "code_eval", contained."""

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """
        Args:
            references: the test of each problem, which is put below each of its programs.
            predictions: the programs.
            k: those beyond the number of programs are left out, as in the original.
        Raises:
            ValueError: this machine cannot contain a program.
        """
        asked = [program_of(program, test) for programs, test in zip(predictions, references) for program in programs]
        run_all(asked)
        details: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for number, (programs, test) in enumerate(zip(predictions, references)):
            outcomes = [_outcomes[program_of(program, test)] for program in programs]
            details[number] = [
                (place, {"task_id": number, "completion_id": place, **outcome._asdict()})
                for place, outcome in enumerate(outcomes)
            ]
        counts = [(len(found), sum(one["passed"] for _, one in found)) for found in details.values()]
        scores = {
            f"pass@{wanted}": math.fsum(pass_at_k(count, correct, wanted) for count, correct in counts) / len(counts)
            for wanted in k if all(count >= wanted for count, _ in counts)
        }  # fmt: skip
        return scores, details


def program_of(program: str, test: str) -> str:
    return f"{program}\n{test}"


def run_all(programs: Sequence[str]) -> None:
    """Run programs, as many at a time as there are processors."""
    new = [program for program in dict.fromkeys(programs) if program not in _outcomes]
    if not new:
        return
    with ThreadPoolExecutor(min(len(new), len(os.sched_getaffinity(0)))) as pool:
        _outcomes.update(zip(new, pool.map(sandbox.run, new)))


def outcomes_of(programs: Sequence[str], test: str) -> list[dict[str, Any]]:
    """How programs ended that were scored since `forget`: "passed" and "reason"."""
    found = (_outcomes.get(program_of(program, test)) for program in programs)
    return [one._asdict() for one in found if one is not None]


def forget() -> None:
    """Programs of another task begin."""
    _outcomes.clear()


@contextmanager
def contained() -> Iterator[None]:
    """While it lasts, a task that asks for the scorer gets ours."""
    import evaluate

    with replaced(evaluate, "load", _load):
        yield


def _load(path: str, *args: Any, **options: Any) -> Any:
    from evaluate.loading import load as original

    return CodeEval() if path == SCORER else original(path, *args, **options)


def is_contained(config: Mapping[str, Any]) -> bool:
    """Whether a task's functions run programs by our scorer alone, as far as one can see: one of them knows it."""
    functions = [config.get("process_results")]
    functions += [one.get("metric") for one in config.get("metric_list") or () if isinstance(one, dict)]
    return any(_knows_scorer(one) for one in functions if callable(one))


def _knows_scorer(function: Callable[..., Any]) -> bool:
    known = getattr(function, "__globals__", {})
    return any(isinstance(value, CodeEval) for value in known.values())

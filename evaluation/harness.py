"""Tasks of lm-eval (the Language Model Evaluation Harness of EleutherAI), answered by a model of ours.

    names -> harness_tasks.py -> tasks with their data      (local_data.py, published.py; code_tasks.py)
          -> lm-eval's evaluator, task by task: prompts, examples, filters, metrics, groups
          -> harness_lm.py -> Answerer                      (the same tokens as lm-eval's own `hf`)
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from evaluation.asking import Answerer
from evaluation.results import Figure, TaskResult
from evaluation.task import Options, Outcome

logger = logging.getLogger(__name__)

_RESAMPLES = 1000
_NO_FIGURES = ("name", "alias", "sample_len", "sample_count")


class Prepared:
    """Tasks whose data are there."""

    def __init__(self, answerer: Answerer, options: Options, found: Any):
        from evaluation.harness_lm import AnsweringLM

        self._lm = AnsweringLM(answerer, options.seed)
        self._options, self._found = options, found
        self._metrics: dict[str, dict[str, Any]] = {}
        """Of the tasks that have ended, as lm-eval's groups read them."""
        self._better: dict[str, bool] = {}

    @property
    def names(self) -> list[str]:
        return list(self._found.tasks)

    def run(self) -> Iterator[Outcome]:
        """Outcome of each task, then of the groups that it completes.

        Raises:
            ValueError: tasks have failed; after all others.
        """
        failures: list[str] = []
        groups = dict(self._found.groups)
        for name, task in self._found.tasks.items():
            try:
                with _surroundings(self._options):
                    outcome = self._evaluate(name, task)
            except ValueError as error:
                failures.append(str(error) if name in str(error) else f"{name}: {error}")
                continue
            yield outcome
            for one, group in list(groups.items()):
                if all(inner.task_name in self._metrics for inner in group.get_all_tasks()):
                    del groups[one]
                    yield self._aggregate(one, group)
        if failures:
            raise ValueError("; ".join(failures))

    def _evaluate(self, name: str, task: Any) -> Outcome:
        from evaluation import code_tasks
        from evaluation.harness_tasks import set_seeds
        from evaluation.local_data import fingerprint

        began = time.monotonic()
        code_tasks.forget()
        set_seeds(self._options)
        self._lm.num_shortened = 0
        found = self._ask(name, task)
        metrics = self._metrics[name] = found["results"][name]
        self._better |= task.higher_is_better()
        if self._lm.num_shortened:
            logger.warning(
                "%s: prompts that are longer than the model's context lost their beginning: %d", name,
                self._lm.num_shortened,
            )  # fmt: skip
        result = TaskResult(
            name, self._figures(metrics), version=str(task.VERSION), settings=self._settings(task),
            data=fingerprint([*task.eval_docs, *(getattr(getattr(task, "sampler", None), "df", None) or ())]),
            seconds=time.monotonic() - began, group=self._group_of(name),
        )  # fmt: skip
        return Outcome(result, [_record(sample) for sample in found["samples"][name]])

    def _ask(self, name: str, task: Any) -> Any:
        """What lm-eval's evaluator gives.

        Raises:
            ValueError: the model cannot be asked this, or the task's own code fails.
        """
        from lm_eval.evaluator import evaluate

        try:
            return evaluate(
                lm=self._lm, task_dict={"tasks": {name: task}, "groups": {}}, limit=self._options.limit,
                bootstrap_iters=_RESAMPLES, log_samples=True, system_instruction=self._options.system or None,
                apply_chat_template=self._options.chat, fewshot_as_multiturn=True,
                confirm_run_unsafe_code=self._options.allow_code_execution,
            )  # fmt: skip
        except (ValueError, OSError):
            raise
        except Exception as error:
            # Filters and metrics are anybody's code, and may raise anything.
            logger.info("the task %s failed:", name, exc_info=error)
            text = " ".join(str(error).split())[:300]
            raise ValueError(f"the task {name} failed ({type(error).__name__}: {text}): leave it out") from error

    def _settings(self, task: Any) -> dict[str, Any]:
        options = self._options
        settings: dict[str, Any] = {
            "num_fewshot": task.get_config("num_fewshot"), "limit": options.limit, "chat": options.chat,
            "seed": options.seed,
        }  # fmt: skip
        if options.system:
            settings["system"] = options.system
        if task.OUTPUT_TYPE == "generate_until":
            settings["generation"] = asked = dict(task.get_config("generation_kwargs"))
            if (room := self._lm.room_for(asked)) is not None:
                settings["max_gen_toks"] = room
        if self._lm.num_shortened:
            settings["shortened"] = self._lm.num_shortened
        return settings

    def _group_of(self, name: str) -> str:
        asked = self._found.asked[name]
        return "" if asked == name else asked

    def _figures(self, metrics: Mapping[str, Any]) -> dict[str, Figure]:
        """Figures from lm-eval's entries, "acc,none" and "acc_stderr,none" for instance."""
        figures = {}
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            value = _plain(value)
            if key in _NO_FIGURES or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = _plain(metrics.get(f"{metric}_stderr{comma}{chosen}"))
            figures[metric if chosen == "none" else key] = Figure(
                float(value), float(error) if isinstance(error, (int, float)) else None,
                int(metrics.get("sample_len", 0)), bool(self._better.get(metric, True)),
            )  # fmt: skip
        return figures

    def _aggregate(self, name: str, group: Any) -> Outcome:
        """Figures of a group, from those of its tasks."""
        metrics = group.aggregate(self._metrics)
        tasks = [inner.task_name for inner in group.get_all_tasks()]
        settings = {"limit": self._options.limit, "chat": self._options.chat, "seed": self._options.seed,
                    "tasks": tasks}  # fmt: skip
        result = TaskResult(name, self._figures(metrics), version=str(group.version), settings=settings,
                            group=self._group_of(name))  # fmt: skip
        return Outcome(result, [])


def prepare(names: Sequence[str], answerer: Answerer, options: Options) -> Prepared:
    """Find the tasks and their data.

    Raises:
        ValueError: lm-eval or data are missing, a task is unknown, or the model cannot be asked it.
    """
    _require_lm_eval(names)
    from evaluation.harness_tasks import find

    with _surroundings(options):
        return Prepared(answerer, options, find(names, options, answerer.can_write))


def require_possible(names: Sequence[str], options: Options, can_write: bool) -> None:
    """Look for the tasks as `prepare` does, long before there is an answer. Nothing is fetched: what a network would
    have to bring is found missing by `prepare` alone.

    Raises:
        ValueError: as `prepare`.
    """
    _require_lm_eval(names)
    from evaluation.harness_tasks import find, look

    with _surroundings(options):
        look(names, options, can_write) if options.data_dir is None else find(names, options, can_write)


def _require_lm_eval(names: Sequence[str]) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError(f"{', '.join(names)}: these tasks need lm-eval: run `pip install -r requirements-eval.txt`, "
                         f"or take --tasks=zero, which needs nothing") from None  # fmt: skip


@contextmanager
def _surroundings(options: Options) -> Iterator[None]:
    """What lm-eval finds, and what it must not disturb."""
    from evaluation.code_tasks import contained
    from evaluation.local_data import data_from
    from evaluation.surroundings import quiet, undisturbed

    with ExitStack() as stack:
        for context in (undisturbed(), quiet(), data_from(options.data_dir), contained()):
            stack.enter_context(context)
        yield


def _plain(value: Any) -> Any:
    """A value as JSON has it: metrics give NumPy's numbers."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def _record(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample's record: what was asked, what was answered, and each metric under its name."""
    from evaluation.code_tasks import outcomes_of

    prompts = [str(arguments[0]) for arguments in sample["arguments"]]
    record: dict[str, Any] = {
        "id": sample["doc_id"], "filter": sample["filter"],
        # The choices of a question share their prompt.
        "prompt": prompts[0] if len(set(prompts)) == 1 else prompts,
    }  # fmt: skip
    continuations = [arguments[1] for arguments in sample["arguments"] if len(arguments) > 1]
    if continuations and all(isinstance(one, str) for one in continuations):
        record["continuations"] = continuations
    record |= {"answers": sample["resps"], "filtered": sample["filtered_resps"], "target": sample["target"]}
    record |= {metric: _plain(sample[metric]) for metric in sample["metrics"]}
    programs = sample["filtered_resps"][0] if sample["filtered_resps"] else None
    if isinstance(programs, list) and isinstance(sample["target"], str):
        if outcomes := outcomes_of([one for one in programs if isinstance(one, str)], sample["target"]):
            record["programs"] = outcomes
    return record | {"doc": sample["doc"]}

"""Tasks by their names, run one after the other on a model that answers.

    names -> own tasks (own/), which need nothing   -> Outcome, Outcome, ...
          -> tasks of lm-eval (harness.py)

evaluate_model.py and training both call `evaluate`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evaluation.asking import Answerer
from evaluation.own import TASKS
from evaluation.task import Options, Outcome, OwnTask


@dataclass(frozen=True)
class Chosen:
    """Tasks that were asked for by name."""

    own: Sequence[OwnTask] = ()
    others: Sequence[str] = ()
    """Names for lm-eval."""

    def require_use_of(self, options: Options) -> None:
        """
        Raises:
            ValueError: an option says something that none of the tasks would heed.
        """
        if options.num_fewshot is not None and not self.others and not any(task.takes_examples for task in self.own):
            those = ", ".join(task.name for task in TASKS.values() if task.takes_examples)
            raise ValueError(f"--num_fewshot is for tasks of lm-eval, and for {those}: leave it out")
        if options.texts and not any(task.name == "zero_bits_per_byte" for task in self.own):
            raise ValueError("--texts is for the task zero_bits_per_byte: add it to --tasks, or leave --texts out")


def choose(names: Sequence[str]) -> Chosen:
    """The tasks of these names; "zero" stands for all of our own.

    Raises:
        ValueError: none is named, or one of our own prefix is unknown.
    """
    if not names:
        raise ValueError("no task is named: give --tasks=zero, or names of lm-eval such as hellaswag,gsm8k")
    own: dict[str, OwnTask] = {}
    others: list[str] = []
    for name in names:
        if name == "zero":
            own |= TASKS
        elif name in TASKS:
            own[name] = TASKS[name]
        elif name.startswith("zero_"):
            raise ValueError(f"there is no task {name}: those without downloads are {', '.join(TASKS)}")
        elif name not in others:
            others.append(name)
    return Chosen(list(own.values()), others)


def evaluate(names: Sequence[str], answerer: Answerer, options: Options) -> Iterator[Outcome]:
    """Run tasks, and yield each as it ends.

    Raises:
        ValueError: a task is unknown, its data are missing, or the model cannot be asked it. Whatever can be known
            beforehand is found before the first task begins; a task that fails later costs the others nothing, and is
            told after them.
    """
    chosen = choose(names)
    for task in chosen.own:
        if task.needs_writing and not answerer.can_write:
            raise ValueError(
                f"{task.name} lets the model write, which a model that is cut over several ranks does not do while it "
                f"trains: evaluate a checkpoint of it with evaluate_model.py"
            )
    prepared = None
    if chosen.others:
        # lm-eval is an extra, and slow to import.
        from evaluation.harness import prepare

        prepared = prepare(chosen.others, answerer, options)
    failures: list[str] = []
    for task in chosen.own:
        try:
            outcome = task.run(answerer, options)
        except ValueError as error:
            failures.append(f"{task.name}: {error}")
        else:
            yield outcome
    if prepared is not None:
        try:
            yield from prepared.run()
        except ValueError as error:
            failures.append(str(error))
    if failures:
        raise ValueError("; ".join(failures))

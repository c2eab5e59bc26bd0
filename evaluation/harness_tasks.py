"""Tasks of lm-eval by their names, built with their data, or refused in a sentence before anything is asked.

lm-eval's own TaskManager parses its 14,000 files first, which takes 10 s and more. Here only those folders are parsed
in which a file defines a name that is wanted.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, wraps
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from evaluation import code_tasks, sandbox
from evaluation.harness_lm import UNDERSTOOD
from evaluation.local_data import advice_for, load_dataset
from evaluation.task import Options

_ROOT = Path(lm_eval.tasks.__file__).parent
_PYTHON_SEED = 0
"""lm-eval's own, for Python's random numbers: by them, tasks shuffle the choices of a question. All others are 1234
there."""
_NAME = re.compile(r"""^["']?(?:task|group)["']?[ \t]*:[ \t]*["']?([^\s"'#\[\]]+)""", re.MULTILINE)


@dataclass
class Found:
    """Tasks that were asked for."""

    tasks: dict[str, Task] = field(default_factory=dict)
    """By their names, in the order in which they were asked for."""
    asked: dict[str, str] = field(default_factory=dict)
    """Task or group -> the name by which it was asked for."""
    groups: dict[str, Group] = field(default_factory=dict)
    """Those with figures of their own, inner ones first."""


def find(names: Sequence[str], options: Options, can_write: bool) -> Found:
    """Build tasks, with their data.

    Raises:
        ValueError: a task is unknown, its data are missing, or it cannot be asked of this model.
    """
    manager = _manager_of(names, options)
    manager._factory = _Factory(options, can_write)
    found = Found()
    for name in names:
        # As if it were asked for alone.
        set_seeds(options)
        loaded = manager.load([name])
        for one, task in loaded["tasks"].items():
            if one not in found.tasks:
                _refuse(_facts_of(task), options, can_write)
                _set_examples(task, options)
                found.tasks[one], found.asked[one] = task, name
        for one, group in reversed(loaded.get("groups", {}).items()):
            if group.has_aggregation and one not in found.groups:
                found.groups[one], found.asked[one] = group, name
    return found


def look(names: Sequence[str], options: Options, can_write: bool) -> None:
    """Refuse what `find` would refuse, as far as the tasks' own files tell; data are not looked at.

    Raises:
        ValueError: a task is unknown, or cannot be asked of this model.
    """
    index = _manager_of(names, options).task_index
    for name in sorted(_leaves(names, index)):
        entry = index[name]
        if entry.yaml_path is not None or entry.cfg is not None:
            _refuse(_raw(entry), options, can_write)


def _leaves(names: Iterable[str], index: Mapping[str, Entry]) -> set[str]:
    """The tasks that names of tasks, groups and tags mean, as far as they are known."""
    leaves: set[str] = set()
    for name in _reachable(names, index) & index.keys():
        entry = index[name]
        if entry.kind is not Kind.GROUP:
            leaves |= entry.tags & index.keys() if entry.kind is Kind.TAG else {name}
    return leaves


def _raw(entry: Entry) -> dict[str, Any]:
    """A task's configuration, with functions by their names: their import may fetch something."""
    return entry.cfg if entry.cfg is not None else load_yaml(entry.yaml_path, resolve_func=False)


def set_seeds(options: Options) -> None:
    """Begin the random numbers that tasks draw, as lm-eval does."""
    random.seed(_PYTHON_SEED)
    np.random.seed(options.seed % (1 << 32))


class _Factory(TaskFactory):
    """lm-eval's maker of tasks, which first refuses what cannot be done."""

    def __init__(self, options: Options, can_write: bool):
        super().__init__()
        self._options, self._can_write = options, can_write

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
        _refuse({**_raw(entry), **(overrides or {})}, self._options, self._can_write)
        try:
            task = super()._build_task(entry, overrides)
        except (ValueError, OSError):
            raise
        except Exception as error:
            # A task's own code may raise anything; a missing package is the usual case.
            text = " ".join(str(error).split())[:300]
            raise ValueError(f"the task {entry.name} cannot be prepared ({type(error).__name__}: {text})") from error
        if getattr(task, "UNSAFE_CODE", False) and not code_tasks.is_contained(vars(task.config)):
            raise ValueError(f"{entry.name} runs programs by code of its own, outside the sandbox: leave it out")
        return task

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config = super()._load_full_config(entry, overrides)
        if entry.kind is Kind.GROUP or "class" in config:
            return config
        if callable(process := config.get("process_docs")):
            config["process_docs"] = _once(process)
        if self._options.data_dir is not None and config.get("dataset_path") and not config.get("custom_dataset"):
            _fit_splits(config, self._options)
        return config


def _once(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of a split that gives the same rows each time. lm-eval calls it for each use of the split, and some
    shuffle the choices: where the library keeps no files, questions and answers would not belong together."""
    known: list[tuple[Any, Any]] = []

    @wraps(process)
    def remembered(rows: Any) -> Any:
        for asked, answer in known:
            if asked is rows:
                return answer
        known.append((rows, process(rows)))
        return known[-1][1]

    return remembered


def _fit_splits(config: dict[str, Any], options: Options) -> None:
    """Take splits out of a task's configuration that the local copy lacks and nobody needs.

    Raises:
        ValueError: one is needed.
    """
    assert options.data_dir is not None
    path, name, task = config["dataset_path"], config.get("dataset_name"), config.get("task")
    splits = load_dataset(path, name, **dict(config.get("dataset_kwargs") or {}))
    if not isinstance(splits, Mapping):
        return
    asked = config.get("test_split") or config.get("validation_split")
    if asked is not None and asked not in splits:
        place = advice_for(options.data_dir, path, name, asked)
        raise ValueError(f"{task} asks questions of the split {asked}, which is missing: add {place}")
    examples, own = config.get("fewshot_config"), config.get("fewshot_split")
    own = (examples.get("split") if isinstance(examples, dict) else None) or own
    has_samples = isinstance(examples, dict) and examples.get("samples") is not None and own is None
    source = own or config.get("training_split") or config.get("validation_split")
    count = _num_examples(config.get("num_fewshot"), options)
    if count and not has_samples and source is not None and source not in splits:
        place = advice_for(options.data_dir, path, name, source)
        raise ValueError(f"{task} shows {count} examples from the split {source}, which is missing: add {place}, or "
                         f"ask without examples by --num_fewshot 0")  # fmt: skip
    for key in ("training_split", "validation_split", "fewshot_split"):
        if config.get(key) is not None and config[key] not in splits:
            config[key] = None
    if isinstance(examples, dict) and examples.get("split") is not None and examples["split"] not in splits:
        config["fewshot_config"] = {key: value for key, value in examples.items() if key != "split"}


def _num_examples(own: int | None, options: Options) -> int:
    """Examples before each question. A task that says 0 has none in any case, as in lm-eval."""
    return own or 0 if options.num_fewshot is None or own == 0 else options.num_fewshot


def _set_examples(task: Task, options: Options) -> None:
    """Decide the number of examples before each question, and by which numbers they are drawn.

    Raises:
        ValueError: there are not so many.
    """
    count = _num_examples(task.get_config("num_fewshot"), options)
    task.set_config(key="num_fewshot", value=count)
    task.set_fewshot_seed(seed=options.seed)
    pool = getattr(getattr(task, "sampler", None), "df", None)
    if not count or pool is None:
        return
    # A question is no example of itself.
    has_question = task.get_config("test_split") == getattr(getattr(task, "fewshot_cfg", None), "split", None)
    if (room := len(pool) - has_question) < count:
        raise ValueError(f"{task.task_name} shows {count} examples, and its data have {room}: give a smaller "
                         f"--num_fewshot")  # fmt: skip


def _facts_of(task: Task) -> dict[str, Any]:
    config = vars(task.config)
    return config | {
        "task": task.task_name, "output_type": task.OUTPUT_TYPE or config.get("output_type"),
        "unsafe_code": getattr(task, "UNSAFE_CODE", False), "doc_to_image": getattr(task, "MULTIMODAL", False),
    }  # fmt: skip


def _refuse(facts: Mapping[str, Any], options: Options, can_write: bool) -> None:
    """
    Args:
        facts: a task's configuration.
    Raises:
        ValueError: the task cannot be asked of this model.
    """
    name = facts.get("task")
    if facts.get("doc_to_image") or facts.get("doc_to_audio"):
        raise ValueError(f"{name} shows pictures or sounds, and our models read text: leave it out")
    if facts.get("output_type") == "generate_until":
        if not can_write:
            raise ValueError(
                f"{name} lets the model write, which a model that is cut over several ranks does not do while it "
                f"trains: evaluate a checkpoint of it with evaluate_model.py"
            )
        wanted = {key: value for key, value in (facts.get("generation_kwargs") or {}).items() if key not in UNDERSTOOD}
        if wanted.pop("num_beams", 1) != 1 or wanted:
            raise ValueError(f"{name} wants texts written in a way that is not known here "
                             f"({', '.join(wanted) or 'num_beams'}): leave it out")  # fmt: skip
    if facts.get("unsafe_code"):
        if not options.allow_code_execution:
            raise ValueError(f"{name} runs programs that the model writes: allow it by --allow_code_execution, which "
                             f"runs them in a sandbox")  # fmt: skip
        # The sandbox's own sentence if it cannot work here.
        sandbox.run("pass")


def _manager_of(names: Sequence[str], options: Options) -> TaskManager:
    """A TaskManager that knows these names, and what they refer to.

    Raises:
        ValueError: a name is unknown.
    """
    manager = TaskManager(include_defaults=False, include_path=options.task_dir)
    own, texts = manager.task_index, _texts()
    index: dict[str, Entry] = {}
    folders: set[str] = set()
    # A user's group may name tasks of lm-eval.
    wanted = _reachable((name for name in names if not Path(name).is_file()), own)
    while new := {folder for folder in texts.keys() - folders if _defines(texts[folder], wanted - own.keys())}:
        folders |= new
        index = _index_of(folders)
        wanted |= _reachable(wanted, index)
    manager._index = index | own
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            known = [*manager.task_index, *(match for text in texts.values() for match in _NAME.findall(text))]
            near = get_close_matches(name, set(known), 3)
            advice = f"did you mean {' or '.join(near)}?" if near else (
                "`python evaluate_model.py --list` says how to see them"
            )  # fmt: skip
            raise ValueError(f"there is no task {name}: {advice}")
    return manager


@cache
def _texts() -> dict[str, str]:
    """Folder of lm-eval's tasks -> text of all its YAML files, and of those without an ending that they include."""
    parts: dict[str, list[str]] = {}
    for path in _ROOT.rglob("*"):
        if (not path.suffix or "yaml" in path.name) and path.is_file() and path.parent != _ROOT:
            parts.setdefault(path.relative_to(_ROOT).parts[0], []).append(
                path.read_text(encoding="utf-8", errors="replace")
            )
    return {folder: "\n".join(texts) for folder, texts in parts.items()}


def _index_of(folders: Iterable[str]) -> dict[str, Entry]:
    """What these folders define, as lm-eval's TaskIndex reads all of them."""
    index: dict[str, Entry] = {}
    paths = [path for folder in folders for path in (_ROOT / folder).rglob("*.yaml") if "__pycache__" not in path.parts]
    for path in sorted(paths, key=lambda one: one.as_posix()):
        with suppress(Exception):
            # It is not a task; lm-eval skips it, too.
            TaskIndex.process_cfg(_read_yaml(path), path, index)
    return index


@cache
def _read_yaml(path: Path) -> dict[str, Any]:
    return load_yaml(path, resolve_func=False)


def _defines(text: str, names: Iterable[str]) -> bool:
    """Whether a file may define one of these tasks, groups or tags: some line ends with the name, alone, in a list or
    behind a key."""
    return any(
        name in text and re.search(rf"""^[^\n#]*(?<![\w/.-]){re.escape(name)}["']?\]?[ \t]*$""", text, re.MULTILINE)
        for name in names
    )


def _reachable(names: Iterable[str], index: Mapping[str, Entry]) -> set[str]:
    """Names, and those that their groups refer to."""
    found: set[str] = set()
    new = list(names)
    while new:
        name = new.pop()
        if name in found:
            continue
        found.add(name)
        entry = index.get(name)
        if entry is not None and entry.kind is Kind.GROUP:
            new += _members(entry.cfg or {})
    return found


def _members(config: Mapping[str, Any]) -> Iterator[str]:
    for item in config.get("task") or ():
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            inner = item.get("task") or item.get("group")
            if isinstance(inner, str):
                yield inner
            else:
                yield from _members(item)

"""Flags of evaluate_model.py, checked without a model. Needs no torch."""

import argparse
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from evaluation.task import Options
from serving.arguments import add_model_flags, require_utf8
from utils.arguments import Parser
from utils.paths import a_path, absent, expand


class _List(argparse.Action):
    """A flag that shows the tasks, and ends the command, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *others: Any) -> NoReturn:
        from evaluation.own import TASKS

        width = max(map(len, TASKS))
        print("Tasks without downloads (zero: all of them):")
        for name, task in TASKS.items():
            needs = [text for text, is_so in (("writes", task.needs_writing), ("runs code", task.runs_code)) if is_so]
            print(f"  {name:{width}}  {', '.join(needs)}".rstrip())
        print(f"Tasks of lm-eval: {'`lm-eval ls tasks` lists them' if has_lm_eval() else _MISSING}; --task_dir adds "
              f"your own")  # fmt: skip
        parser.exit()


_MISSING = "not installed: run `pip install -r requirements-eval.txt`"


def has_lm_eval() -> bool:
    return find_spec("lm_eval") is not None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command line.

    Raises:
        SystemExit: an unknown argument, --help or --list.
    """
    parser = Parser(prog="evaluate_model.py", description="Evaluate a trained model: lm-eval's tasks, and our own.")
    parser.add_argument("--list", action=_List, nargs=0, help="show the tasks, and end")
    add_model_flags(parser)
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks", required=True, metavar="A,B,...", help="names of tasks, groups or tags; zero: all without downloads"
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="ask the first N questions of each task alone")
    tasks.add_argument("--num_fewshot", type=int, metavar="K", help="examples before each question")
    tasks.add_argument("--data_dir", type=a_path, metavar="D", help="local copies of data sets; nothing is downloaded")
    tasks.add_argument(
        "--texts", action="append", default=[], metavar="NAME=PATH",
        help="a file or folder of your own texts, whose bits per byte zero_bits_per_byte gives; can be repeated",
    )  # fmt: skip
    tasks.add_argument("--task_dir", type=a_path, metavar="D", help="folder with tasks of your own, as YAML files")
    tasks.add_argument("--chat", action="store_true", help="put questions by the model's chat template")
    tasks.add_argument("--system", default="", metavar="TEXT", help="with --chat: what the model is told first")
    tasks.add_argument(
        "--allow_code_execution", action="store_true", help="run programs that the model writes, in a sandbox"
    )
    tasks.add_argument("--seed", type=int, default=1234, help="for examples and for drawn answers (default: 1234)")
    parser.add_argument(
        "--output_dir", type=a_path, metavar="D", help="default: RUN/eval/step-N for a run, out/eval/NAME for a folder"
    )
    return parser.parse_args(argv)


def names_of(text: str) -> list[str]:
    """Names of tasks, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def options_of(args: argparse.Namespace) -> Options:
    """How tasks are run, by the flags.

    Raises:
        ValueError: a value is impossible.
    """
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be positive, got {args.limit}: leave it out for all questions")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ValueError(f"--num_fewshot must not be negative, got {args.num_fewshot}")
    if not 0 <= args.seed < 1 << 63:
        raise ValueError(f"--seed must lie between 0 and 2^63 - 1, got {args.seed}")
    if args.system and not args.chat:
        raise ValueError("--system needs --chat")
    require_utf8("--system", args.system)
    folders = {}
    for name in ("data_dir", "task_dir"):
        folders[name] = Path(value).absolute() if (value := getattr(args, name)) else None
        if value and not Path(value).is_dir():
            raise ValueError(f"--{name}: {f'{value} is a file' if Path(value).exists() else absent(value)}")
    return Options(
        args.limit, args.num_fewshot, folders["data_dir"], folders["task_dir"], args.chat, args.system,
        args.allow_code_execution, args.seed, _texts_of(args.texts),
    )  # fmt: skip


def _texts_of(named: Sequence[str]) -> dict[str, Path]:
    """Paths of a user's texts by their names."""
    found: dict[str, Path] = {}
    for one in named:
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--texts={one} must be a name and a path, such as --texts=mine=my_texts")
        if name in found:
            raise ValueError(f"--texts names {name} twice")
        if not Path(expand(path)).exists():
            raise ValueError(f"--texts: {absent(expand(path))}")
        found[name] = Path(expand(path)).absolute()
    return found


def require_lm_eval(names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: these tasks need lm-eval, which is missing.
    """
    if names and not has_lm_eval():
        raise ValueError(f"{', '.join(names)}: tasks of lm-eval, which is {_MISSING}, or take --tasks zero, which "
                         f"needs nothing")  # fmt: skip


def command_of(argv: Sequence[str]) -> str:
    """The command, as one would type it."""
    return shlex.join(["python", "evaluate_model.py", *argv])

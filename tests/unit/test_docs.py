"""The documentation against the code: its commands go through the real parsers, its links and file names exist.

No command is run, except for the one block of README.md that a newcomer copies (`soak`).
"""

import argparse
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import monitor_process
from configurator import _FIELDS, parse_config
from data_preprocess.shards import set_of
from demo.corpus import copy_standard_library
from model import Decoder, ModelConfig
from monitor.command import TrainCommand
from parallel.launch import parser_of_flags
from train_my_ddp import number_of_processes
from training.config import resolve
from utils.arguments import Parser

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "configs/*.md", "parallel/*.md", "docker/*.md")
    for path in ROOT.glob(pattern)
)
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/*.yaml"))
COMMANDS = {"python", "python3", "torchrun", "make", "pip", "train_my_ddp.py"}


class Parsed(BaseException):
    """The command line was accepted; nothing above the parser shall catch this."""


def parse_only(parser: argparse.ArgumentParser, args: list[str] | None = None, namespace: object = None) -> None:
    _parse_args(parser, args, namespace)
    raise Parsed


_parse_args = argparse.ArgumentParser.parse_args


def code_of(page: Path) -> tuple[list[str], list[str]]:
    """(lines of its code blocks, joined at backslashes; spans in backticks elsewhere). A YAML file's code is in its
    comments, indented by two more blanks."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".yaml":
        lines = [line[2:] for line in text.splitlines() if line.startswith("#   ")]
        return join_lines(lines), []
    blocks, prose, fence = [], [], None
    for line in text.splitlines():
        if (mark := re.match(r"\s*(```|~~~)(\w*)", line)) is not None:
            fence = (mark[2] or "sh") if fence is None else None
        elif fence is not None:
            blocks += [line] if fence in ("sh", "bash", "shell", "console", "text") else []
        elif line.startswith("    ") and not re.match(r"\s*([-*]|[0-9]+\.) ", line):
            blocks.append(line)
        else:
            prose.append(line)
    return join_lines(blocks), re.findall(r"`([^`]+)`", "\n".join(prose))


def join_lines(lines: list[str]) -> list[str]:
    return re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines()


def commands_of(page: Path) -> Iterator[list[str]]:
    """Words of each command that this file can check, from its first word in COMMANDS on."""
    blocks, spans = code_of(page)
    for line in [*blocks, *spans]:
        # A page's remark beside a command follows two blanks or a hash.
        line = re.split(r"\s{2,}|\s#", line.strip().removeprefix("$ "))[0]
        for part in re.split(r"\s(?:&&|\|\||[|;&>])(?:\s|$)", line):
            try:
                words = shlex.split(part)
            except ValueError:
                # An apostrophe: prose.
                continue
            names = [Path(word).name for word in words]
            start = next((i for i, name in enumerate(names) if name in COMMANDS), None)
            # Arrows mean a picture.
            if start is None or {"->", "-->"} & set(words) or len(words) == start + 1:
                continue
            if names[start] == "make" and start:
                continue
            words = [word for word in words[start:] if not (word == "..." or word.startswith("$"))]
            yield [names[start], *words[1:]]


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a command with its own parser.

    Raises:
        Exception, SystemExit: the parser does not accept it, or a file that it names is missing.
    """
    tool, rest = words[0], words[1:]
    if tool == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
        unknown = [word for word in rest if "=" not in word and word not in targets]
        assert not unknown, f"make has no target {unknown}"
    elif tool == "train_my_ddp.py":
        check_training(rest)
    elif rest[:2] == ["-m", "parallel.launch"]:
        check_launch(rest[2:], monkeypatch)
    elif tool == "torchrun":
        check_launch(rest, monkeypatch)
    elif tool == "pip" or rest[:2] == ["-m", "pip"]:
        for flag, value in zip(rest, rest[1:]):
            assert flag != "-r" or (ROOT / value).exists(), value
    elif rest[0] == "-m":
        check_module(rest[1], rest[2:], monkeypatch)
    elif rest[0].endswith(".py"):
        check_script(rest[0], rest[1:], monkeypatch)


def check_launch(rest: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the words after torchrun, or after the launcher that takes its flags; the script may be missing."""
    is_begun = not any(word.endswith(".py") or word == "-m" for word in rest)
    launcher = parser_of_flags().parse_args([*rest, "train_my_ddp.py"] if is_begun else rest)
    if launcher.module:
        check_module(launcher.training_script, launcher.training_script_args, monkeypatch)
    else:
        check_script(launcher.training_script, launcher.training_script_args, monkeypatch)


def check_training(flags: list[str]) -> None:
    _, flags = number_of_processes(flags)
    if not any(re.match(r"--(train_)?data_dir\b", flag) for flag in flags):
        flags = [*flags, "--data_dir=O"]
    if "--help" not in flags:
        parse_config(flags)


def check_script(script: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ROOT / script).is_file(), f"{script} does not exist"
    if script == "train_my_ddp.py":
        check_training(argv)
    elif script == "monitor_process.py" and argv[-1] != "--":
        # (If it ends here, another command is to follow.)
        options, words = monitor_process.parse_arguments(argv)
        monitor_process.options_of(options)
        assert words or options.status, "no training command"
        if words:
            command = TrainCommand.parse(words)
            check_command(words if Path(words[0]).name in COMMANDS else words[1:], monkeypatch)
            assert not options.hosts or not command.is_standalone
    elif "/" not in script:
        check_module(script.removesuffix(".py"), argv, monkeypatch)


DOORS = {
    "utils.checkpoint": "checkpoint.command", "utils.resplot": "viewer.command", "utils.timeline": "viewer.timeline",
}  # fmt: skip
"""Old name of a command -> module that reads its command line."""


def check_module(name: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / name.split(".")[0]).exists() and not (ROOT / f"{name}.py").exists():
        # Not ours, such as pytest. The files that it works on exist.
        missing = [word for word in argv if "/" in word and not (ROOT / word).exists()]
        assert not missing, missing
        return
    name = DOORS.get(name, name)
    path = ROOT / name.replace(".", "/")
    if path.is_dir():
        assert (path / "__main__.py").exists(), f"{name} is no command"
        name = f"{name}.command"
    elif name.startswith("tests."):
        # These cannot be imported beside other tests: once imported, Triton cannot be interpreted any more.
        source = path.with_suffix(".py").read_text(encoding="utf-8")
        unknown = [w for w in argv if w.startswith("--") and f'"{w.partition("=")[0]}"' not in source]
        assert not unknown, unknown
        return
    main = importlib.import_module(name).main
    if not argv:
        # The command is only named.
        return
    with monkeypatch.context() as patched, pytest.raises(Parsed):
        patched.setattr(sys, "argv", [name, *argv])
        for parser in (argparse.ArgumentParser, Parser):
            patched.setattr(parser, "parse_args", parse_only)
        main(argv) if inspect.signature(main).parameters else main()


def problems_of(items: list, check: Callable) -> list[str]:
    """Failed checks, one line each."""
    problems = []
    for item in items:
        try:
            check(item)
        except (Exception, SystemExit) as error:
            problems.append(f"{shlex.join(item) if isinstance(item, list) else item}: {error}")
    return problems


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS])
def test_commands_are_accepted_by_their_own_parsers(page: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    problems = problems_of(list(commands_of(ROOT / page)), lambda words: check_command(words, monkeypatch))
    assert not problems, f"{page}:\n" + "\n".join(problems)


def test_the_checks_find_commands_and_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checker that finds nothing would pass for ever."""
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.md"
    page.write_text(
        "    python -m dataset.inspect O --smaple 1     a sample\n    make tests\n"
        "    torchrun --standalone train_my_ddp.py \\\n        --hiden_size=3 ...\n"
        "Also `python generate.py --ckpt R`, `python -m dataset.audit R --data O` and\n```sh\ntorchrun --nnode=2 "
        "--nproc train_my_ddp.py\npython monitor_process.py --hots h.yaml -- torchrun train_my_ddp.py\n```\n"
    )
    commands = list(commands_of(page))
    assert len(commands) == 7
    assert len(problems_of(commands, lambda words: check_command(words, monkeypatch))) == 5
    found = {words[0] for page in PAGES for words in commands_of(ROOT / page)}
    assert found >= {"python", "make", "train_my_ddp.py"}


def anchors_of(page: Path) -> set[str]:
    """Anchors of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        if not there.exists() or (anchor and anchor not in anchors_of(there)):
            broken.append(target)
    return broken


def missing_files(page: Path) -> list[str]:
    """Missing files among the names in backticks that begin in the repository, and bare names of Python and Markdown
    files. A word in capitals stands for a name."""
    top = {entry.name for entry in ROOT.iterdir() if entry.name not in ("out", ".venv")}
    missing = []
    for span in code_of(page)[1]:
        name = span.rstrip("/")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or re.search(r"(?<![a-zA-Z])[A-Z]{3,}(?=\.py)", name):
            continue
        looks_like_file = ("/" in span and name.split("/")[0] in top) or re.search(r"\w\.(py|md)$", name)
        if looks_like_file and not any((base / name).exists() for base in (ROOT, page.parent)):
            missing.append(span)
    return missing


@pytest.mark.parametrize("page", PAGES)
def test_what_pages_link_to_and_name_exists(page: str):
    assert not (links := broken_links(ROOT / page)), f"{page} links to {links}"
    assert not (names := missing_files(ROOT / page)), f"{page} names {names}"


def test_broken_links_and_wrong_names_are_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` c\n[x](no.md) ![y](no.png) [z](#a-b-c) [w](#nowhere) [v](https://example.com/x) [u](page.md)\n"
        "`model/decoder.py`, `model/lama.py`, `docs/`, `docs/nothing/`, `llama.py`, `out/mine/ckpt`, `model/NAME.py`\n"
    )
    assert broken_links(page) == ["no.md", "no.png", "#nowhere"]
    assert missing_files(page) == ["model/lama.py", "docs/nothing/", "llama.py"]


@cache
def own_flags() -> set[str]:
    """Flags of all our commands."""
    flags = {"--help"} | {f"--{prefix}{name}" for name in _FIELDS for prefix in ("", "no-")}
    for file in (*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")):
        if file.relative_to(ROOT).parts[0] not in ("out", "tests"):
            flags |= set(re.findall(r'"(--[a-zA-Z]\w*)"', file.read_text(encoding="utf-8")))
    return flags


# Those pages mention other programs' flags.
@pytest.mark.parametrize("page", [p for p in PAGES if not p.startswith(("docs/launch/", "docs/docker", "docker/"))])
def test_flags_that_are_named_exist(page: str):
    """A flag in backticks belongs to one of our commands."""
    named = {flag for span in code_of(ROOT / page)[1] if span.startswith("--")
             for flag in re.findall(r"(?:^| )(--[\w-]+)", span)}  # fmt: skip
    assert not named - own_flags(), f"{page} names {sorted(named - own_flags())}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [page for page in PAGES if page.startswith("docs/") and page.count("/") == 1 and page != "docs/README.md"]
    assert pages
    assert not [page for page in pages if f"({page.removeprefix('docs/')})" not in index]


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_resolve(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    config, _ = parse_config([name, "--data_dir=O", "--init_from=R"])
    config.model.resolve(vocab_size=64320, max_seq_len=config.data.max_seq_len)
    # Two processes and, except for the demo, eight.
    for world_size in (1, 2) if "demo" in name else (1, 2, 8):
        derived = resolve(config, world_size, num_train_samples=1_000_000)
        assert derived.global_batch_size == config.data.train_batch_size * config.data.gradient_accumulation_steps
    assert name.removeprefix("configs/").removesuffix(".yaml") in (ROOT / "configs/README.md").read_text()


def num_parameters(shape: ModelConfig) -> int:
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    attention = shape.hidden_size * (2 * q + 2 * kv) + (q + 2 * kv if shape.qkv_bias else 0)
    block = attention + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    return shape.num_hidden_layers * block + shape.hidden_size + embeddings


def test_configurations_have_the_size_that_they_are_called_by():
    """1.7b is the original's: its log gives this number."""
    for name, vocab_size, expected in (("124m", 50304, 123_587_328), ("1.7b", 64320, 1_773_668_352),
                                       ("1.1b", 64320, 1_255_499_776)):  # fmt: skip
        config, _ = parse_config([str(ROOT / f"configs/{name}.yaml"), "--data_dir=O"])
        shape = config.model.resolve(vocab_size, config.data.max_seq_len)
        assert num_parameters(shape) == expected
        # The formula holds for a small model of the same kind.
        small = replace(shape, vocab_size=64, hidden_size=32, head_dim=8, num_hidden_layers=2, intermediate_size=48)
        assert sum(parameter.numel() for parameter in Decoder(small).parameters()) == num_parameters(small)


SIZES = [("tiny", 8192, "5.3 M"), ("laptop", 8192, "13.8 M"), ("gpu", 50304, "124 M"), ("1b", 64320, "1.26 B")]


@pytest.mark.parametrize(("size", "vocab_size", "parameters"), SIZES)
def test_the_table_of_sizes_says_what_they_are(size: str, vocab_size: int, parameters: str):
    config, _ = parse_config(["--data_dir=O", f"--size={size}"])
    data, rate = config.data, config.optimizer.learning_rate
    count = num_parameters(config.model.resolve(vocab_size, data.max_seq_len))
    value, unit = parameters.split()
    # To the last digit in the table.
    assert float(value) == round(count / {"M": 1e6, "B": 1e9}[unit], len(value.partition(".")[2]))
    tokens = data.train_batch_size * data.gradient_accumulation_steps * data.max_seq_len
    name = {"muon": "Muon", "adamw": "AdamW"}[config.optimizer.optimizer]
    row = f"| `{size}` | {parameters} ({vocab_size:,}) | {data.max_seq_len:,} | {tokens:,} | {name}, {rate:.0e} |"
    assert row.replace("e-0", "e-") in (ROOT / "configs/README.md").read_text()


def block_of(page: Path, heading: str) -> list[str]:
    """Commands of the first code block below a heading."""
    text = page.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    return join_lines(textwrap.dedent(re.search(r"(?:^    .*\n)+", text, re.M)[0]).splitlines())


@pytest.mark.soak
def test_a_newcomers_block_runs_as_it_stands(tmp_path: Path):
    """README's "Train on your own text", word by word, in a folder that sees the repository."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("out", "tests"):
            (tmp_path / entry.name).symlink_to(entry)
    copy_standard_library(tmp_path / "all")
    corpus = tmp_path / "D"
    corpus.mkdir()
    # Small, because all of it is trained on, but with enough words for the vocabulary. Texts of the validation set stay
    # whole, so that they fill a sample.
    for number, path in enumerate(sorted((tmp_path / "all").rglob("*.py"))):
        content = path.read_bytes()
        kept = content if set_of(content, 0.01) == "valid" else content[:500]
        (corpus / f"{number}.txt").write_bytes(kept.decode("utf-8", errors="ignore").encode("utf-8"))
    commands = block_of(ROOT / "README.md", "## Train on your own text")
    assert [shlex.split(command)[0] for command in commands] == ["python"] * 5
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for command in commands:
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.stdout.startswith("Once upon a time")
    assert (tmp_path / "out/mine/ckpt").is_dir()

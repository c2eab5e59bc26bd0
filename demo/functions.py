"""Short functions of the standard library, and the check that an answer is the requested function."""

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_preprocess.shards import set_of
from evaluation.python_source import parses, tree_of

MOST_LINES = 8
_MOST_CHARACTERS = 320


@dataclass(frozen=True)
class Function:
    module: str
    """For example "json.decoder"."""
    name: str
    does: str
    """First sentence of its docstring, on one line."""
    source: str
    """Source without decorators and docstring, at column 0."""

    @property
    def question(self) -> str:
        # The name comes last: the model must copy it, so it stays close to the answer.
        return f"{self.module}: {self.does.rstrip('.')}. Write the function {self.name}"


def asked_name(question: str) -> str:
    """Name of the function that a `Function.question` asks for.

    Raises:
        ValueError: it does not ask for a function.
    """
    match = re.search(r"Write the function (\w+)$", question)
    if match is None:
        raise ValueError(f"this question asks for no function: {question[:80]!r}")
    return match[1]


def is_asked_function(answer: str, name: str) -> bool:
    """Whether an answer is a single function of that name that Python compiles and that does something.

    A body of only `pass` or a string is refused, so that the shortest way out does not count. Any other body is
    accepted, whatever it does.
    """
    if not parses(answer):
        return False
    body = tree_of(answer).body
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef) or body[0].name != name:
        return False
    return any(
        not isinstance(line, ast.Pass) and not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        for line in body[0].body
    )


def functions_of(text: str, module: str) -> Iterator[Function]:
    """Short functions that have a docstring and further statements.

    Raises:
        SyntaxError: the text is not Python.
    """
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree_of(text)):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or not (docstring := ast.get_docstring(node)):
            continue
        begin, end = node.body[0].lineno - 1, node.body[0].end_lineno
        source = textwrap.dedent("".join(lines[node.lineno - 1 : begin] + lines[end : node.end_lineno])).strip() + "\n"
        does = " ".join(re.split(r"(?<=\.)\s|\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
        short = source.count("\n") <= MOST_LINES and len(source) <= _MOST_CHARACTERS and 10 <= len(does) <= 160
        if short and is_asked_function(source, node.name):
            yield Function(module, node.name, does, source)


def module_name(path: Path, corpus: Path) -> str:
    """Name for importing a module: json/decoder.py is json.decoder, json/__init__.py is json."""
    parts = path.relative_to(corpus).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def modules_of(corpus: Path, valid_ratio: float) -> Iterator[tuple[str, str, str]]:
    """(set, name, text) of each valid Python module of the corpus, by path; the sets are those of pretokenize."""
    for path in sorted(corpus.rglob("*.py")):
        try:
            text = path.read_bytes().decode("utf-8")
            tree_of(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        yield set_of(text.encode("utf-8"), valid_ratio), module_name(path, corpus), text

"""zero_completion: the model writes the body of a Python function, given its signature and docstring.

"parses" is the share whose function Python compiles. "doctest" is the share that passes the examples of the docstring;
programs of a model are only run if the user allows it, in the sandbox, so otherwise there is no such figure. A chat
model is asked for the whole function.
"""

import ast
import re
import textwrap
import time
from doctest import DocTestParser
from pathlib import Path
from typing import NamedTuple

from evaluation import sandbox
from evaluation.asking import Answerer, Writing, Written
from evaluation.own.outcomes import Record, figures_of, fingerprint, outcome, too_long
from evaluation.own.questions import Asker, said, texts_of
from evaluation.python_source import cut_body, parses, tree_of
from evaluation.task import Options, Outcome

_MOST = 96
"""New tokens at most."""
_STOP = ("\ndef ", "\nclass ", "\n@", "\n#", "\nif ", "\nimport ", "\nfrom ", "\nprint(", "\n>>> ")
"""What begins something new at column 0."""
_LIMITS = sandbox.Limits(seconds=5.0)
_CHECK = '''
def _check(function, examples):
    import doctest

    test = doctest.DocTest([doctest.Example(*one) for one in examples], {{function.__name__: function}}, "", "", 0, "")
    failed, tried = doctest.DocTestRunner(verbose=False).run(test)
    if failed or tried != len(examples):
        raise AssertionError(f"{{failed}} of {{len(examples)}} examples fail")


_check({name}, {examples})
'''


class Function(NamedTuple):
    """A question."""

    name: str
    header: str
    """Lines of signature and docstring."""
    body: str
    doc: str
    """The docstring's text."""


def questions() -> list[Function]:
    """All functions, in the order of their file."""
    text = Path(__file__).with_name("functions.py").read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    found = []
    for node in tree_of(text).body:
        if isinstance(node, ast.FunctionDef):
            begin, end = node.lineno - 1, node.body[0].end_lineno
            header, body = "".join(lines[begin:end]), "".join(lines[end : node.end_lineno])
            found.append(Function(node.name, header, body, ast.get_docstring(node, clean=False) or ""))
    return found


class CompletionTask:
    name, version = "zero_completion", "1"
    needs_writing, runs_code = True, False
    takes_examples = False

    def run(self, answerer: Answerer, options: Options) -> Outcome:
        """
        Raises:
            ValueError: programs are to be run, and this machine cannot contain them; or the questions are to be put by
                a chat template, and the model has none.
        """
        begun = time.monotonic()
        if options.allow_code_execution:
            # Known before the model has worked for it.
            sandbox.run("pass", _LIMITS)
        asker = Asker(answerer, options, "Complete this Python function. Answer with its whole source alone.")
        made = questions()
        samples: list[Record] = []
        asked: list[tuple[Record, Function, Writing]] = []
        for one in made[: options.limit]:
            samples.append({"function": one.name, "question": one.header})
            writing = asker.writing(one.header, _MOST, _STOP)
            if writing:
                asked.append((samples[-1], one, writing))
            else:
                samples[-1]["left_out"] = too_long(answerer.context)
        for (sample, one, _), written in zip(asked, texts_of(answerer, [writing for *_, writing in asked])):
            source = function_in(said(written.text), one.name) if asker.is_chat else continued(one, written)
            sample |= {"written": written.text, "parses": float(bool(source))}
            if not options.allow_code_execution:
                sample["not_run"] = "programs of a model are run only with --allow_code_execution"
                continue
            done = sandbox.run(program(source, one), _LIMITS) if source else sandbox.Outcome(False, "does not parse")
            sample |= {"doctest": float(done.passed), "reason": done.reason}
        figures = figures_of(samples, "parses") | figures_of(samples, "doctest")
        return outcome(self, options, begun, figures, samples, fingerprint([list(one) for one in made]),
                       code_is_run=options.allow_code_execution)  # fmt: skip


def continued(asked: Function, written: Written) -> str:
    """The function whose body a text continues; empty if it is none."""
    body = cut_body(written.text, 0, written.has_ended)
    return asked.header + body if body.strip() and parses(asked.header + body) else ""


def function_in(answer: str, name: str) -> str:
    """Source in an answer, between fences if it has some; empty if it does not define the function."""
    fenced = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    source = textwrap.dedent(fenced[1] if fenced else answer)
    if not parses(source):
        return ""
    defined = [node.name for node in tree_of(source).body if isinstance(node, ast.FunctionDef)]
    return source if name in defined else ""


def program(source: str, asked: Function) -> str:
    """Program that ends as it should if the function gives what each example of the docstring shows."""
    examples = [(one.source, one.want) for one in DocTestParser().get_examples(asked.doc)]
    return f"{source}\n\n{_CHECK.format(name=asked.name, examples=examples)}"

"""Chat template of a tokenizer folder as a program: a small one in Jinja, which somebody else wrote.

It runs in Jinja's sandbox, with the filters, functions and variables that transformers gives it, so that it writes the
same text here. One thing differs: it never learns today's date, or the same conversation would become other tokens
tomorrow.
"""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

DAY = datetime.datetime(2024, 7, 26)
"""Date that a template gets: the one that Llama 3's templates write where they are not told."""


class _Refusal(Exception):
    """Sentence of a template's `raise_exception`."""


class _Generation(Extension):
    """The tag `{% generation %}`, by which some templates mark the learnt text. Its content is written and the mark is
    ignored, since the learnt text is found for every template here, see regions.py."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class JinjaTemplate:
    """A program in Jinja that lays out conversations.

    Args:
        source: the program.
        tokens: variables such as "bos_token" -> the token's text.
    Raises:
        ValueError: it is not valid Jinja.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": DAY.strftime}
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise ValueError(f"the chat template is not valid Jinja: {_line(error)}") from None
        self._tokens = dict(tokens)
        self.asks_for_the_date = any(name.name == "strftime_now" for name in tree.find_all(nodes.Name))
        self.looks_for = tuple(sorted(set(_sought(tree)), key=lambda text: (-len(text), text)))
        """Strings that it looks for in the texts of messages, such as "</think>", the longest first."""

    def render(self, messages: Sequence[dict], tools: Sequence[dict] = (), add_generation_prompt: bool = False) -> str:
        """Text that the program writes.

        Raises:
            ValueError: it refuses these messages, or fails on them.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except _Refusal as error:
            raise ValueError(f"the chat template refuses it: {_line(error)}") from None
        except Exception as error:
            # A program that somebody else wrote can fail in any way.
            raise ValueError(f"the chat template fails on it ({type(error).__name__}: {_line(error)})") from None


def _refuse(message: object) -> None:
    raise _Refusal(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes text that HTML would take for a tag.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _sought(tree: nodes.Template) -> Iterator[str]:
    """String constants that are searched for in something (`in`), or given to a method (`split`, `startswith`)."""
    for node in tree.find_all((nodes.Compare, nodes.Call)):
        if isinstance(node, nodes.Compare):
            operands = [node.expr] if node.ops[0].op in ("in", "notin") else []
        else:
            operands = node.args if isinstance(node.node, nodes.Getattr) else []
        for operand in operands:
            if isinstance(operand, nodes.Const) and isinstance(operand.value, str) and operand.value.strip():
                yield operand.value

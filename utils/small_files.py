"""Small JSON and YAML files from anybody: plain values, or one sentence that says what is wrong. Never more time or
memory than in proportion to the text."""

import json
import math
import os
import re
import stat
from pathlib import Path

import yaml

from utils.text import plain

_BEYOND_FLOATS = 1 << 1023
_LONGEST_NUMBER = 1000
"""Most characters in a number. Longer ones can take quadratic time."""
_MOST_MERGED = 10_000
"""Most entries that `<<:` may copy in all: a few lines could ask for more than any memory holds."""


def read_small(path: Path, most: int) -> bytes:
    """Contents of a file.

    Args:
        most: most bytes.

    Raises:
        ValueError: it is larger, or not a regular file; the message follows its name in a sentence.
        OSError: it cannot be read.
    """
    # Without O_NONBLOCK, this would wait for the writer of a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a file")
        with open(descriptor, "rb", closefd=False) as file:
            text = file.read(most + 1)
    finally:
        os.close(descriptor)
    if len(text) > most:
        raise ValueError(f"it is larger than {most >> 10} KiB")
    return text


def parse_json(text: bytes) -> object:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON; the message follows the file's name in a sentence.
    """
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not complete JSON: {error.msg}, line {error.lineno}") from None
    except (ValueError, RecursionError):
        raise ValueError("it is nested too deeply, or a number in it is too long") from None


def shown(value: object) -> str:
    """A value in a sentence. A list or mapping is only called that: with aliases, its text may be longer than any
    memory."""
    if isinstance(value, (dict, list, tuple, set)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def is_number(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether it is a number of JSON or YAML that fits into a float and lies in a range. Booleans are not numbers."""
    return type(value) in (int, float) and least <= value <= most and abs(value) < _BEYOND_FLOATS


def is_whole(value: object, least: int = 0, most: int = 1 << 53) -> bool:
    return type(value) is int and least <= value <= most


class _Loader(yaml.SafeLoader):
    """YAML without its traps: a key that is given twice is a mistake (YAML's own loader takes the last one), and only
    text that looks like a decimal number is a number."""

    def construct_yaml_int(self, node: yaml.Node) -> int:
        """Decimal numbers only: in YAML, 0022 is 18 and 1:30 is 90. Thousands may be set apart: 1_000_000."""
        if not re.fullmatch("[-+]?(0|[1-9][0-9]*|[1-9][0-9]{0,2}(_[0-9]{3})+)", _short(node).value):
            raise _mistake(f"{node.value[:80]!r} is not a decimal number: write one, or put it in quotes", node)
        return int(node.value)

    def construct_yaml_float(self, node: yaml.Node) -> float:
        return super().construct_yaml_float(_short(node))

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        if not isinstance(node, yaml.MappingNode):
            raise _mistake("it announces a mapping, and holds something else", node)
        own, merged = {}, None
        for key_node, value_node in node.value:
            is_merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = "<<" if is_merge else self.construct_object(key_node, deep=True)
            try:
                is_twice = merged is not None if is_merge else key in own
            except TypeError:
                raise _mistake("a key is a list or a mapping", key_node) from None
            if is_twice:
                raise _mistake(f"{str(key)[:80]!r} is given twice", key_node)
            if is_merge:
                merged = self._merged(value_node)
            else:
                own[key] = self.construct_object(value_node, deep=deep)
        return (merged or {}) | own

    def _merged(self, node: yaml.Node) -> dict:
        """The entries that `<<:` copies; among several mappings, the first with a key counts."""
        found = self.construct_object(node, deep=True)
        merged: dict = {}
        for mapping in found if isinstance(found, list) else [found]:
            if not isinstance(mapping, dict):
                raise _mistake("`<<:` wants a mapping", node)
            self.copied = getattr(self, "copied", 0) + len(mapping)
            if self.copied > _MOST_MERGED:
                raise _mistake("`<<:` copies too much", node)
            for key, value in mapping.items():
                merged.setdefault(key, value)
        return merged


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def _short(node: yaml.Node) -> yaml.Node:
    if len(node.value) > _LONGEST_NUMBER:
        raise _mistake(f"a number of more than {_LONGEST_NUMBER:,} characters", node)
    return node


def _mistake(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def parse_yaml(text: bytes) -> object:
    """The plain value of a YAML text. An alias is one object in several places: code that shows a value must bound it.

    Raises:
        ValueError: it is not YAML; the message follows the file's name in a sentence.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        problem = error.problem or error.context or "it is not YAML"
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(plain(problem) + where) from None
    except yaml.YAMLError as error:
        raise ValueError(plain(str(error).partition("\n")[0])) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # Values that do not keep what their form promises: `!!int x`, `2000-99-99`, ten thousand digits.
        raise ValueError(f"it holds an impossible value: {plain(error)}") from None

"""Tools and their calls, brought from the spellings of records to one: OpenAI's.

tools        [{"type": "function", "function": {"name", ...}}], bare [{"name", ...}], either as a text of JSON
tool_calls   [{"id", "type": "function", "function": {"name", "arguments"}}], bare [{"name", "arguments"}]; the
             arguments are an object, or a text of JSON that is one
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    id: str
    """Empty if the call has none."""
    call: dict
    """{"type": "function", "function": {"name": str, "arguments": dict}}, with the id before it if there is one."""

    @property
    def name(self) -> str:
        return self.call["function"]["name"]


def loaded(value: object) -> object:
    """Value of a field. A list or an object may stand there as JSON text, as in a table; other values are unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def tools_from(value: object, where: str) -> tuple[dict, ...]:
    """Tools that a value lists.

    Raises:
        ValueError: it is not a list of tools with names.
    """
    value = loaded(value)
    values = [value] if isinstance(value, dict) else value
    if not isinstance(values, list):
        raise ValueError(f"{where} is not a list of tools")
    return tuple(_tool(one, f"tool {number} of {where}") for number, one in enumerate(values))


def _tool(value: object, where: str) -> dict:
    value = loaded(value)
    inner = loaded(value.get("function")) if isinstance(value, dict) and "function" in value else value
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise ValueError(f'{where} has no "name"')
    if isinstance(value, dict) and inner is not value and value.get("type") not in (None, "function"):
        raise ValueError(f"{where} is not a function, and others are not understood")
    tool = {"type": "function", "function": inner}
    _require_unicode(tool, where)
    return tool


def calls_from(value: object, where: str) -> list[Call]:
    """Calls that a value lists.

    Raises:
        ValueError: it is not a list of calls.
    """
    value = loaded(value)
    values = [value] if isinstance(value, dict) else value
    if not isinstance(values, list) or not values:
        raise ValueError(f'{where} is not a call, or list of calls, with "name" and "arguments"')
    return [_call(one, f"call {number} of {where}") for number, one in enumerate(values)]


def _call(value: object, where: str) -> Call:
    value = loaded(value)
    inner = loaded(value.get("function")) if isinstance(value, dict) and "function" in value else value
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise ValueError(f'{where} has no "name"')
    if inner is not value and value.get("type") not in (None, "", "function"):
        raise ValueError(f"{where} is not a call of a function, and others are not understood")
    arguments = inner["arguments"] if inner.get("arguments") is not None else inner.get("parameters")
    if arguments is None or arguments == "":
        arguments = {}
    arguments = loaded(arguments)
    if not isinstance(arguments, dict):
        raise ValueError(f'{where} has "arguments" that are not an object')
    call = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    _require_unicode(call | {"id": value.get("id")}, where)
    id = value.get("id")
    id = id if isinstance(id, str) else ""
    return Call(id, {"id": id, **call} if id else call)


def _require_unicode(value: dict, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where} is not valid Unicode") from None
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{where} cannot be written as JSON") from None


class Results:
    """Order of the calls' results, which must be that of the calls, since most templates write no ids."""

    def __init__(self):
        self._due: list[Call] = []

    def called(self, calls: list[Call]) -> None:
        self._due = list(calls)

    def also_called(self, calls: list[Call]) -> None:
        self._due += calls

    def origin_of(self, id: object, name: str, where: str) -> tuple[str, str]:
        """Name of the tool whose result comes now, and id of its call; empty if they are unknown.

        Raises:
            ValueError: it is the turn of another call.
        """
        own = id if isinstance(id, str) else ""
        if not self._due:
            return name, own
        call = self._due.pop(0)
        is_of_another = own and call.id and own != call.id
        if is_of_another or (name and name != call.name and any(name == other.name for other in self._due)):
            raise ValueError(
                f"{where} is the result of another call than the one whose turn it is, {call.name}: put the results "
                f"into the order of the calls"
            )
        return name or call.name, own or call.id


def texts_of(values: tuple[dict, ...]) -> Iterator[str]:
    """Texts of tools or calls, in which others may be looked up."""
    yield from (json.dumps(value, ensure_ascii=False) for value in values)

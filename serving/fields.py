"""Fields of a request: what each may hold, and a sentence about what it may not.

A table names the fields of an endpoint. Any other field is refused by name; a field that is documented elsewhere but
not offered here is let through only at the values at which it means nothing (`off`).
"""

import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from utils.small_files import is_number, is_whole, shown
from utils.text import plain

Reader = Callable[[Any], Any]
"""Value from JSON -> the value to use. Raises ValueError with what the field "must be"."""
_LONGEST_NAME = 60


class Mistake(ValueError):
    """A request that cannot be answered, by the client's fault or the server's state.

    Args:
        message: sentence for a person.
        param: name of the field at fault.
        code: short word for programs.
        headers: more headers of the answer.
    """

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status
        self.headers = dict(headers or {})

    def as_json(self) -> dict:
        """Body of the answer, in OpenAI's form."""
        kind = (
            "authentication_error" if self.status == 401 else "permission_error" if self.status == 403 else
            "rate_limit_error" if self.status == 429 else "server_error" if self.status >= 500 else
            "invalid_request_error"
        )  # fmt: skip
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Field(NamedTuple):
    """A field that an endpoint takes."""

    read: Reader
    default: Any = None
    """Used if the field is absent or null."""


def parse_body(body: bytes) -> dict:
    """The object that a request's body holds.

    Raises:
        Mistake: it is not one JSON object in UTF-8.
    """
    try:
        # json.loads itself would take other encodings, NaN, and halves of surrogate pairs.
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise Mistake("the body is not UTF-8", code="invalid_json") from None
    except UnicodeEncodeError:
        raise Mistake("the body spells half a surrogate pair, which is no text", code="invalid_json") from None
    except json.JSONDecodeError as error:
        sentence = f"the body is not JSON: {error.msg}, line {error.lineno} column {error.colno}"
        raise Mistake(sentence, code="invalid_json") from None
    except RecursionError:
        raise Mistake("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        # An integer of thousands of digits, or a constant.
        what = str(error) if "JSON has no" in str(error) else "a number in the body is too long"
        raise Mistake(what, code="invalid_json") from None
    if not isinstance(value, dict):
        raise Mistake(f"the body must be a JSON object, got {shown(value)}", code="invalid_json")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def take(body: Mapping[str, Any], fields: Mapping[str, Field], off: Mapping[str, tuple], where: str = "") -> dict:
    """Values of all fields of a table.

    Args:
        off: documented field that is not offered -> values at which it means nothing, besides null.
        where: beginning of the names in messages, such as "messages[0].".
    Raises:
        Mistake: a field is unknown, or its value impossible.
    """
    values = {name: field.default for name, field in fields.items()}
    for name, value in body.items():
        if name in fields:
            if value is not None:
                values[name] = read(fields[name].read, value, where + name)
        elif name not in off:
            raise Mistake(_unknown(name, fields, where), where + plain(name, _LONGEST_NAME), "unknown_parameter")
        elif value is not None and not any(type(value) is type(one) and value == one for one in off[name]):
            raise Mistake(
                f"{where}{name} is not supported by this server: leave it out", where + name, "unsupported_parameter"
            )
    return values


def _unknown(name: str, fields: Mapping[str, Field], where: str) -> str:
    near = get_close_matches(name[:_LONGEST_NAME], fields, 1)
    meant = f": did you mean {near[0]}?" if near else ": leave it out"
    return f"{where}{plain(name, _LONGEST_NAME)} is not a field of this request{meant}"


def read(reader: Reader, value: Any, name: str) -> Any:
    """
    Raises:
        Mistake: the reader refuses the value.
    """
    try:
        return reader(value)
    except Mistake:
        raise
    except ValueError as error:
        raise Mistake(f"{name} must be {error}", name, "invalid_value") from None


def number(least: float, most: float, above: bool = False) -> Reader:
    """A number in a range.

    Args:
        above: the lower bound itself is not allowed.
    """

    def take_number(value: Any) -> float:
        if not is_number(value, least, most) or (above and value == least):
            bounds = f"above {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"
            raise ValueError(f"a number {bounds}, got {shown(value)}")
        return float(value)

    return take_number


def whole(least: int, most: int) -> Reader:
    """A whole number in a range."""

    def take_whole(value: Any) -> int:
        if not is_whole(value, least, most):
            raise ValueError(f"a whole number from {least} to {most}, got {shown(value)}")
        return value

    return take_whole


def boolean(value: Any) -> bool:
    """true or false."""
    if type(value) is not bool:
        raise ValueError(f"true or false, got {shown(value)}")
    return value


def text(value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ValueError(f"a text, got {shown(value)}")
    return value


def one_of(*words: str) -> Reader:
    """One of some words."""

    def take_word(value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError(f"{' or '.join(words)}, got {shown(value)}")
        return value

    return take_word


def stops(most: int, longest: int) -> Reader:
    """A text or a list of texts that end an answer.

    Args:
        most: texts.
        longest: characters of each.
    """

    def take_stops(value: Any) -> tuple[str, ...]:
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or len(found) > most or not all(
            isinstance(one, str) and 0 < len(one) <= longest for one in found
        ):
            raise ValueError(f"a text or a list of at most {most}, each of 1 to {longest} characters")
        return tuple(dict.fromkeys(found))

    return take_stops


def ids(most: int) -> Reader:
    """A list of token ids, at most so many. Whether the model has such tokens is checked later."""

    def take_ids(value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or len(value) > most or not all(is_whole(one) for one in value):
            raise ValueError(f"a list of at most {most} token ids")
        return tuple(value)

    return take_ids


def biases(most: int) -> Reader:
    """Token id, as JSON's keys spell it -> number that is added to its score."""

    def take_biases(value: Any) -> dict[int, float]:
        if not isinstance(value, dict) or len(value) > most:
            raise ValueError(f"an object of at most {most} token ids and numbers")
        found: dict[int, float] = {}
        for key, bias in value.items():
            if not (key.isascii() and key.isdigit() and len(key) < 12):
                raise ValueError(f"an object whose keys are token ids, got {shown(key)}")
            if not is_number(bias, -100, 100):
                raise ValueError(f"an object whose values are numbers from -100 to 100, got {shown(bias)}")
            found[int(key)] = float(bias)
        return found

    return take_biases

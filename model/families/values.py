"""Values of a configuration, read one by one."""

from collections.abc import Mapping
from typing import cast

from model.hf_files import shown

REQUIRED = object()
"""Default of a key that must be there."""
_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}


def read_value(values: Mapping, name: str, kind: type, default: object) -> object:
    """The value of a key. Numbers may be written as 32000 or 32000.0, but not as "32000": we do not guess what a string
    means, and transformers refuses it, too.

    Args:
        kind: int, float or bool.
        default: the value where the key is missing or null.
    Raises:
        ValueError: it is missing, or of another kind.
    """
    value = values.get(name)
    if value is None:
        if default is REQUIRED:
            raise ValueError(f"{name} is missing")
        return default
    fits = isinstance(value, bool) if kind is bool else isinstance(value, (int, float)) and not isinstance(value, bool)
    # As a floating-point number, 1e999 is infinite; integers may have any number of digits.
    fits = fits and (kind is bool or -1e300 < value < 1e300) and (kind is not int or value == int(value))
    if not fits:
        raise ValueError(f"{name} must be {_NAMES[kind]}, not {shown(value)}")
    return kind(value)


def read_int(values: Mapping, name: str, default: object = REQUIRED) -> int:
    """The whole number at a key; see `read_value`."""
    return cast(int, read_value(values, name, int, default))


def read_values(values: Mapping, kinds: Mapping[str, tuple[type, object]]) -> dict[str, object]:
    """The values of several keys, each with its kind and its default; see `read_value`."""
    return {name: read_value(values, name, kind, default) for name, (kind, default) in kinds.items()}


def require_positive(fields: Mapping[str, object], *names: str) -> None:
    """See that numbers are not 0, which in our fields means "fill it in": a folder states its numbers.

    Raises:
        ValueError: one is below 1.
    """
    for name in names:
        value = fields[name]
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

"""Options of commands: sizes; checks for the */config.py files, each with a sentence that names the option; options
that have an effect only beside others; and options that are refused beside others."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OnlyWith:
    """Options that have an effect only beside others."""

    names: tuple[str, ...]
    counts: Callable[[Mapping[str, Any]], bool]
    """Whether they have an effect, given all options by name."""
    otherwise: str
    """The reason if they have none; it follows "has no effect" in a sentence."""


@dataclass(frozen=True)
class Refused:
    """Options that cannot be used beside others."""

    names: tuple[str, ...]
    beside: Callable[[Mapping[str, Any]], bool]
    """Whether the others are used, given all options by name."""
    sentence: str
    """What is wrong and what to do; it follows the option. Braces name options whose values it tells."""


def refuse(options: Mapping[str, Any], usual: Mapping[str, Any], rules: Iterable[Refused]) -> None:
    """
    Args:
        options: all options by name.
        usual: their defaults.
    Raises:
        ValueError: one of the options of a rule is used beside those that it does not go with.
    """
    for rule in rules:
        used = [name for name in rule.names if options[name] != usual[name]]
        if used and rule.beside(options):
            raise ValueError(f"{as_given(used[0], options[used[0]])} {rule.sentence.format_map(options)}")


def as_given(name: str, value: object) -> str:
    """An option as users write it, without the value of a number: --compile, --no-async_save, --optimizer=muon."""
    if isinstance(value, str):
        return f"--{name}={value}"
    return f"--no-{name}" if value is False else f"--{name}"


def require_positive(config: object, *names: str) -> None:
    """
    Raises:
        ValueError: one of the fields is 0 or negative.
    """
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


def require_not_negative(config: object, *names: str) -> None:
    """
    Raises:
        ValueError: one of the fields is negative.
    """
    for name in names:
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}")


def require_at_most(config: object, most: int, *names: str) -> None:
    """
    Raises:
        ValueError: one of the fields is larger.
    """
    for name in names:
        if getattr(config, name) > most:
            raise ValueError(f"{name} must be at most {most:,}, got {getattr(config, name):,}")


def require_between(config: object, least: float, most: float, *names: str) -> None:
    """
    Raises:
        ValueError: one of the fields lies outside; both bounds are allowed.
    """
    for name in names:
        if not least <= getattr(config, name) <= most:
            raise ValueError(f"{name} must lie between {least:,} and {most:,}, got {getattr(config, name)}")


def require_share_below_1(config: object, *names: str) -> None:
    """
    Raises:
        ValueError: one of the fields is negative, 1 or larger.
    """
    for name in names:
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(config, name)}")


def parse_size(text: str) -> int:
    """Bytes that --max_shard_size names.

    Raises:
        ValueError: the text is not a size, or none of at least one byte.
    """
    match = re.fullmatch(r"([0-9]{1,15}) ?([KMGT]?)B?", text.upper())
    if match is None or not int(match[1]):
        raise ValueError(f"max_shard_size must be a size such as 500MB or 5GB, or a number of bytes; got {text!r}")
    return int(match[1]) * 1000 ** " KMGT".index(match[2] or " ")

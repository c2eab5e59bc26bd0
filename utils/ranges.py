"""Ranges of options, each refused with one sentence that names the option. For the `check` of the */config.py files."""


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

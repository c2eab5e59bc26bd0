"""Text from elsewhere, made safe to show."""


def plain(text: object, most: int = 200) -> str:
    """One printable line: a file may hold escape sequences, line breaks and text that changes its direction.

    Args:
        most: characters; the rest is cut off.
    """
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)[:most])

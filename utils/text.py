"""Text from elsewhere, made safe to show."""


def plain(text: object, most: int = 200) -> str:
    """The text as one printable line. A file may hold escape sequences, line breaks and marks that turn the
    direction of writing.

    Args:
        most: characters; the rest is cut off.
    """
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)[:most])

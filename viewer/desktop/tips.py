"""Texts that appear beside the mouse."""

import html


def tip(text: str) -> str:
    """Qt would take what looks like HTML for HTML, and load its pictures."""
    return f"<span>{html.escape(text)}</span>"

"""Texts of tool tips."""

import html


def tip(text: str) -> str:
    """A tool tip with this text. Qt would take a text that looks like HTML for HTML, and load its pictures."""
    return f"<span>{html.escape(text)}</span>"

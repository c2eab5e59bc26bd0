"""Whether a text is Python, and where a function that a model wrote ends. Nothing is run."""

import ast
import warnings


def tree_of(source: str) -> ast.Module:
    """Syntax tree of a module.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: the source is not Python. (ValueError: it holds a null
            character; the last two: its brackets are nested too deeply.)
    """
    with warnings.catch_warnings():
        # Warnings, such as of odd escapes, concern the authors and only clutter the screen.
        warnings.simplefilter("ignore")
        return ast.parse(source)


def parses(source: str) -> bool:
    """Whether Python compiles the source; nothing is run."""
    try:
        tree = tree_of(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(tree, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def cut_body(completion: str, indent: int, finished: bool) -> str:
    """Body of a function, at the beginning of a text that continues its header. It ends before a line that is indented
    no deeper than the header, or before a last line that is unfinished.

    Args:
        indent: columns before the header.
        finished: whether the text ended by itself, so that its last line is whole.
    """
    lines = completion.splitlines(keepends=True)
    if lines and not finished and not completion.endswith("\n"):
        lines.pop()
    body = []
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        body.append(line)
    return "".join(body)

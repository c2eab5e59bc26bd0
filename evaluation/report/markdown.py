"""A card as Markdown (CommonMark with tables). Texts are escaped, so that none becomes structure."""

import re
from collections.abc import Iterator, Sequence

from evaluation.report.card import Block, Card, Chart, Facts, Heading, Table, Text, Verbatim
from evaluation.report.chart_values import table_of
from evaluation.report.words import on_a_line, on_lines

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&$]|(?<=:)//|(?<=\bwww)\.)", re.IGNORECASE)
"""What may begin structure anywhere in a line; addresses, which some readers make links of, too."""
_AT_BEGIN = re.compile(r"^([-+=](?=[\s=+-]|$)|\d+(?=[.)](?:\s|$)))")
"""What begins a list or underlines a heading."""
_TONES = {"good": "✓ ", "bad": "✗ ", "note": "", "": ""}


def to_markdown(card: Card) -> str:
    parts = [f"# {escaped(card.title)}", escaped(card.made)]
    parts += ["\n".join(f"- **{escaped(remark)}**" for remark in card.remarks)] if card.remarks else []
    parts += list(_written(card.summary))
    for section in card.sections:
        parts.append(f"## {escaped(section.title)}")
        for block in section.blocks:
            parts += _written(block)
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """A text on one line, in which nothing is markup."""
    line = _SPECIAL.sub(lambda match: f"\\{match[1]}", on_a_line(text))
    return _AT_BEGIN.sub(lambda match: f"{match[1]}\\" if match[1].isdigit() else f"\\{match[1]}", line)


def fenced(text: str) -> str:
    """A text in a block of code, whose fence is longer than any run of backticks in it."""
    text = on_lines(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _written(block: Block) -> Iterator[str]:
    if isinstance(block, Text):
        yield _TONES[block.tone] + escaped(block.text)
    elif isinstance(block, Heading):
        yield f"### {escaped(block.text)}"
    elif isinstance(block, Facts):
        yield "\n".join(f"- **{escaped(name)}**: {escaped(value)}" for name, value in block.rows)
    elif isinstance(block, Table):
        yield from _table(block.title, block.header, block.rows)
    elif isinstance(block, Verbatim):
        if block.title:
            yield _TONES[block.tone] + f"{escaped(block.title)}:"
        yield fenced(block.text)
    elif isinstance(block, Chart):
        table = table_of(block)
        yield from _table(f"{block.title} ({block.y_name})", table.header, table.rows)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if title:
        yield f"**{escaped(title)}**"
    lines = [list(map(escaped, header)), ["---"] + ["---:"] * (len(header) - 1), *(list(map(escaped, r)) for r in rows)]
    yield "\n".join(f"| {' | '.join(line)} |" for line in lines)

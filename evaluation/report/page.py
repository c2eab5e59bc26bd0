"""A card as one HTML page that needs nothing else: no script, no file, no network. Texts are escaped."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import count
from pathlib import Path

from evaluation.report.card import Block, Card, Chart, Facts, Heading, Section, Table, Text, Verbatim
from evaluation.report.chart_values import table_of
from evaluation.report.drawing import drawn, text
from evaluation.report.words import on_lines

_STYLE = Path(__file__).with_name("page.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""A browser loads nothing for this page, whatever slips into it."""


def to_page(card: Card) -> str:
    """The page.

    Raises:
        OSError: its style, a file beside this one, cannot be read.
    """
    charts = count(1)
    links = "".join(f'<li><a href="#part-{n}">{text(s.title)}</a></li>' for n, s in enumerate(card.sections, 1))
    remarks = "".join(f"<li>{text(remark)}</li>" for remark in card.remarks)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{text(card.title)}</title>",
        f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style></head><body>",
        f'<header><h1>{text(card.title)}</h1><p class="made">{text(card.made)}</p></header>',
        f'<section class="remarks" aria-label="Remarks"><ul>{remarks}</ul></section>' if remarks else "",
        f'<section class="summary" aria-label="Summary">{_facts(card.summary)}</section>',
        f'<nav aria-label="Parts of this page"><ul>{links}</ul></nav>',
        "<main>",
        *(part for number, section in enumerate(card.sections, 1) for part in _section(section, number, charts)),
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _section(section: Section, number: int, charts: "count[int]") -> Iterator[str]:
    yield f'<section aria-labelledby="part-{number}"><h2 id="part-{number}">{text(section.title)}</h2>'
    in_row = False
    for block in section.blocks:
        # Charts that follow one another stand side by side where the page is wide.
        if isinstance(block, Chart) != in_row:
            in_row = not in_row
            yield '<div class="charts">' if in_row else "</div>"
        yield _chart(block, next(charts)) if isinstance(block, Chart) else _block(block)
    yield ("</div>" if in_row else "") + "</section>"


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p{_class(block.tone)}>{text(block.text)}</p>"
    if isinstance(block, Heading):
        return f"<h3>{text(block.text)}</h3>"
    if isinstance(block, Facts):
        return _facts(block)
    if isinstance(block, Table):
        if block.folded:
            return f"<details><summary>{text(block.title)}</summary>{_table(block.header, block.rows)}</details>"
        return _table(block.header, block.rows, block.title)
    assert isinstance(block, Verbatim)
    title = f"<figcaption>{text(block.title)}</figcaption>" if block.title else ""
    content = escape(on_lines(block.text))
    return f'<figure{_class(block.tone)}>{title}<pre dir="auto" tabindex="0">{content}</pre></figure>'


def _class(tone: str) -> str:
    return f' class="{tone}"' if tone else ""


def _facts(facts: Facts) -> str:
    rows = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts.rows)
    return f"<dl>{rows}</dl>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """A table that is scrolled by itself where the page is narrow."""
    caption = f"<caption>{text(title)}</caption>" if title else ""
    head = "".join(f'<th scope="col">{text(cell)}</th>' if cell else "<td></td>" for cell in header)
    body = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>{"".join(f"<td>{text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    label = text(title or ", ".join(filter(None, header)))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>{caption}<thead><tr>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _chart(chart: Chart, number: int) -> str:
    table = table_of(chart)
    return (
        f'<figure class="chart"><figcaption>{text(chart.title)}</figcaption>\n{drawn(chart, number)}\n'
        f"<details><summary>Values</summary>{_table(table.header, table.rows)}</details></figure>"
    )

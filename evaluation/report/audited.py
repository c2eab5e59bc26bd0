"""Whether the run took each sample once: the result of dataset/audit.py."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataset.audit import audit_run, report
from evaluation.report.card import Block, Heading, Section, Text
from evaluation.report.run import Run
from evaluation.report.trained import data_dir


def audited(runs: Sequence[Run], is_wanted: bool = True) -> tuple[Section, str]:
    """The section, and the verdict on the first run in a few words.

    Args:
        is_wanted: whether the data are read; without, the section says that they were not.
    """
    if not is_wanted:
        told = "not done: --no_audit was given"
        return Section("Audit", [Text(f"The audit was {told}.", "note")]), told
    blocks: list[Block] = []
    verdicts = []
    for run in runs:
        found = list(_audit(run))
        verdicts.append(found[0].text)
        if len(runs) > 1:
            blocks.append(Heading(run.name))
        blocks += found[1:]
    return Section("Audit", blocks), verdicts[0]


def _audit(run: Run) -> Iterator[Text]:
    """The verdict, then what the audit said."""
    started = time.monotonic()
    directory = data_dir(run)
    elsewhere: list[Path] = [directory] if directory is not None else []
    try:
        audit = audit_run(run.path, elsewhere)
        lines = list(report(run.path, audit, time.monotonic() - started))
    except (ValueError, OSError, LookupError, TypeError) as error:
        # A record of another version may lack anything.
        yield Text("cannot be done")
        yield Text(f"The audit cannot be done: {error}.", "bad")
        return
    if audit.findings:
        yield Text(f"FAILED, {len(audit.findings)} findings")
        yield Text(f"The audit FAILED with {len(audit.findings)} findings.", "bad")
    else:
        yield Text("each sample was taken once")
    *before, last = lines
    yield from (Text(line, "bad" if line.startswith("WRONG") else "") for line in before)
    # The digests' sentence, or one more finding.
    yield Text(last, "bad" if audit.findings else "good")

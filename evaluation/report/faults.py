"""What went wrong in a run, and what it cost."""

from collections.abc import Iterator, Sequence

from checkpoint.retention import abandoned
from evaluation.report.card import Block, Heading, Section, Table, Text
from evaluation.report.launches import repeated_steps
from evaluation.report.run import Run
from evaluation.report.words import counted, cut, listed, moment
from monitor.status import STATUS_FILE, Status
from runs.exits import read_exit_records
from runs.heartbeat import read_heartbeats

_MOST_LAUNCHES = 40
_LONGEST_REASON = 300


def faults(runs: Sequence[Run]) -> Section:
    """The section."""
    blocks: list[Block] = []
    for run in runs:
        if len(runs) > 1:
            blocks.append(Heading(run.name))
        blocks += _of(run)
    return Section("Faults survived", blocks)


def _of(run: Run) -> Iterator[Block]:
    if not run.launches:
        yield Text("The log records no launch.")
        return
    again = repeated_steps(list(run.launches))
    unplanned = [launch for launch in run.launches[:-1] if not launch.reason]
    if len(run.launches) == 1:
        yield Text("One launch, and nothing was done again.")
    else:
        yield Text(
            f"{counted(len(run.launches), 'launch').replace('launchs', 'launches')}, of which "
            f"{len(unplanned) or 'none'} ended without saying why; {counted(sum(again), 'step')} done again."
        )
    if len(run.launches) > 1:
        header = ["launch", "began", "after step", "last step", "steps done again", "processes", "ended"]
        yield Table(header, _rows(run, again))
    yield from _others(run)


def _rows(run: Run, again: list[int]) -> list[list[str]]:
    rows = []
    for number, launch in enumerate(run.launches, 1):
        is_last = number == len(run.launches)
        ended = state_of(run) if is_last else launch.reason or "no end recorded: killed, or a crash"
        changed = launch.start.get("changed")
        if isinstance(changed, dict) and changed and number > 1:
            ended += f"; begun with other {listed(changed)}"
        rows.append(
            [str(number), moment(launch.started), str(launch.first_step), str(launch.last_step), str(again[number - 1]),
             str(launch.start.get("world_size", "?")), cut(ended, _LONGEST_REASON)]
        )  # fmt: skip
    if len(rows) > _MOST_LAUNCHES:
        left_out = len(rows) - _MOST_LAUNCHES
        rows = [*rows[: _MOST_LAUNCHES // 2], ["...", f"{left_out} more", *[""] * 5], *rows[-_MOST_LAUNCHES // 2 :]]
    return rows


def state_of(run: Run) -> str:
    """Whether the newest launch has ended."""
    if not run.launches:
        return "not known"
    if run.launches[-1].reason:
        return run.launches[-1].reason
    times = [record["time"] for record in read_heartbeats(run.paths.heartbeat_dir) if "time" in record]
    last = max([*times, run.launches[-1].last_time])
    return f"no end recorded: going on, or killed; last sign of life {moment(last)}"


def _others(run: Run) -> Iterator[Block]:
    for kind, word in (("save_failed", "Saves"), ("eval_failed", "Evaluations")):
        failed = [record for record in run.records if record["name"] == kind]
        if failed:
            steps = listed(str(record.get("step")) for record in failed[:10])
            reason = cut(str(failed[-1].get("problem", "no reason recorded")), _LONGEST_REASON)
            yield Text(f"{word} that failed: {len(failed)}, at step {steps}; the last one: {reason}.", "bad")
    for record in read_exit_records(run.paths.exit_dir):
        if record["code"]:
            reason = cut(record["reason"], _LONGEST_REASON)
            yield Text(f"Rank {record['rank']} of the last launch ended with code {record['code']}: {reason}.")
    if left := abandoned(run.paths.ckpt_dir):
        yield Text(f"Checkpoints that a resumed launch left behind and that still lie there: {listed(left)}.")
    if (run.paths.monitor_dir / STATUS_FILE).exists():
        yield Text(_monitored(run))


def _monitored(run: Run) -> str:
    try:
        status = Status.read(run.path)
    except (ValueError, OSError) as error:
        return f"A monitor looked after the run, but {error}."
    ending = f"; the last launch ended: {cut(status.last_ending, _LONGEST_REASON)}" if status.last_ending else ""
    return (
        f"A monitor looked after the run: state {status.state}, {counted(status.attempt, 'launch')}, "
        f"{counted(status.restarts, 'restart')} by the last monitor{ending}."
    ).replace("launchs", "launches")

"""What a run cost, and where its time went."""

import math
import statistics
from collections.abc import Sequence

from evaluation.report.card import Block, Heading, Section, Table, Text
from evaluation.report.launches import Launch, Spent, spent_by, standing_until
from evaluation.report.run import Run
from evaluation.report.trained import adapter_config, model_config, opened
from evaluation.report.words import NOT_RECORDED, amount, duration, listed, number, share
from model.flops import flops_per_token_strict
from runs.traces import mean_figures, read_trace

_PARTS = (
    ("computing", "computing, in steps that stand"), ("data_wait", "waiting for data"),
    ("comm_wait", "waiting for communication"), ("validation", "validation"), ("evaluation", "evaluation"),
    ("texts", "texts that the model wrote"), ("saves", "held up by saves"),
    ("repeated", "steps that a later launch did again"), ("other", "other, within launches"),
    ("between", "between launches, start-up included"),
)  # fmt: skip


def cost(runs: Sequence[Run]) -> Section:
    """The section."""
    columns = {run.name: _costs(run) for run in runs}
    names = list(next(iter(columns.values())))
    rows = [[name, *(found[name] for found in columns.values())] for name in names]
    blocks: list[Block] = [Table(["", *columns], rows)]
    blocks.append(
        Text(
            "FLOPs are those of forward and backward passes by the strict formula (model/flops.py), of steps that "
            "stand and of those done again. Energy is what counters of the first machine showed; without "
            "counters there is no figure."
        )
    )
    return Section("Cost", blocks)


def _costs(run: Run) -> dict[str, str]:
    spent, tokens = spent_by(list(run.launches)), run.last("train", "tokens")
    again = _share_done_again(run)
    per_token = flops_per_token(run)
    flops = NOT_RECORDED
    if per_token is not None and tokens is not None and math.isfinite(tokens):
        flops = amount(tokens * per_token * (1 + again), "FLOP")
    rate = "–"
    training = spent.computing + spent.data_wait + spent.comm_wait
    if tokens and training > 0:
        rate = f"{tokens / training:,.0f}"
    mfu = run.snapshot.tables.get("train", {}).get("mfu")
    usable = [value for value in mfu.tolist() if math.isfinite(value)] if mfu is not None else []
    return {
        "tokens read": "–" if tokens is None else f"{tokens:,.0f}",
        "wall time, first record to last": duration(spent.wall) if run.launches else NOT_RECORDED,
        "of it in launches": duration(spent.wall - spent.between) if run.launches else NOT_RECORDED,
        "tokens per second of training": rate,
        "FLOPs": flops,
        "FLOPs a token": NOT_RECORDED if per_token is None else amount(per_token, "FLOP"),
        "MFU, median": f"{100 * statistics.median(usable):.1f}%" if usable else NOT_RECORDED,
        "processes": listed(dict.fromkeys(str(one.start.get("world_size", "?")) for one in run.launches)) or "–",
        "device": _devices(run.launches),
        "energy": _energy(run.launches),
    }


def _energy(launches: Sequence[Launch]) -> str:
    """What the counters showed, and which they are."""
    found = [launch for launch in launches if launch.energy is not None]
    if not found:
        return "no counter recorded"
    joules = sum(launch.energy or 0.0 for launch in found)
    lists = [launch.start.get("energy_counters") for launch in found]
    names = dict.fromkeys(str(name) for names in lists if isinstance(names, list) for name in names)
    told = f"{amount(joules, 'J')} ({joules / 3.6e6:.3g} kWh)"
    told += f", of {len(found)} of {len(launches)} launches" if len(found) < len(launches) else ""
    return told + (f", of {listed(names)}" if names else "")


def _devices(launches: Sequence[Launch]) -> str:
    found = dict.fromkeys(str(launch.start["device"]) for launch in launches if launch.start.get("device"))
    return listed(found) or NOT_RECORDED


def _share_done_again(run: Run) -> float:
    """Steps that were done again, as a share of those that stand."""
    again = standing = 0.0
    for launch, until in zip(run.launches, standing_until(list(run.launches))):
        for step, count in zip(launch.steps, launch.counts):
            kept = min(max(until - (step - count), 0), count)
            standing, again = standing + kept, again + count - kept
    return again / standing if standing else 0.0


def flops_per_token(run: Run) -> float | None:
    """FLOPs of a token, as the run recorded them; for runs of earlier versions by the formula, from their data."""
    recorded = run.start.get("flops_per_token")
    if isinstance(recorded, (int, float)) and 0 < recorded < 1e20:
        return float(recorded)
    config, dataset = model_config(run), opened(run)
    if config is None or isinstance(dataset, str) or adapter_config(run).is_used:
        return None
    return flops_per_token_strict(config, *dataset.context_and_supervised_share())


def where_the_time_went(runs: Sequence[Run]) -> Section:
    """The section."""
    columns: dict[str, Spent] = {run.name: spent_by(list(run.launches)) for run in runs if run.launches}
    if not columns:
        return Section("Where the time went", [Text("The log records no launch.")])
    rows = []
    for name, title in _PARTS:
        cells = [getattr(spent, name) for spent in columns.values()]
        if any(cells):
            told = zip(cells, columns.values())
            rows.append([title, *(f"{duration(cell)} ({share(cell, spent.wall)})" for cell, spent in told)])
    rows.append(["wall time", *(duration(spent.wall) for spent in columns.values())])
    blocks: list[Block] = [
        Text(
            "By the first rank's records. Waits are those that no other work hid. What a process did between its last "
            "record and its end is not known: it counts as time between launches."
        ),
        Table(["", *columns], rows),
    ]
    for run in runs:
        blocks += _traced(run)
    return Section("Where the time went", blocks)


def _traced(run: Run) -> list[Block]:
    """Mean figures of profiled steps, of the first trace."""
    try:
        paths = sorted(path for path in run.paths.profile_dir.iterdir() if ".json" in path.name)
    except OSError:
        return []
    for path in paths[:1]:
        try:
            figures = mean_figures(read_trace(path))
        except (ValueError, OSError) as error:
            return [Text(f"The trace {path.name} of {run.name} cannot be used: {error}", "bad")]
        rows = [[name, f"{number(value)} ms"] for name, value in figures.items()]
        return [Heading(f"{run.name}: a traced step, by {path.name}"), Table(["", "mean of the traced steps"], rows)]
    return []

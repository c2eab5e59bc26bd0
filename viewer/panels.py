"""The panels, and which of them a view shows for some runs. To add one, add an entry to one of the tuples below."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from runs.history import Snapshot
from viewer.text import translate
from viewer.view import ShownRun, View


@dataclass(frozen=True)
class Curve:
    """One metric of one kind of record."""

    table: str
    """Kind of the records."""
    metric: str
    name: str = ""
    """Name of the curve in a panel that has several."""
    style: str = "-"
    """matplotlib's line style."""
    factor: float = 1.0
    """What the metric is multiplied by, for its unit on the axis."""


@dataclass(frozen=True)
class Panel:
    """A picture of one or several curves."""

    key: str
    """Name on the command line."""
    title: str
    curves: tuple[Curve, ...]
    usual: bool = False
    """Shown unless other panels were chosen."""
    large: bool = False
    """Takes the room of four."""
    by_task: bool = False
    """The task decides what values mean, or how large they are: the runs of each task get a panel of their own."""
    task: str | None = None
    """The task whose runs are shown; None: all runs."""


def _both(metric: str, title: str, usual: bool = False, key: str = "", **more: bool) -> Panel:
    """A panel with a metric's values in training and in validation."""
    curves = (Curve("train", metric, "training"), Curve("valid", metric, "validation", "--"))
    return Panel(key or metric, title, curves, usual, **more)


def _pair(key: str, title: str, prefix: str, usual: bool = False) -> Panel:
    """A panel with a metric's values for chosen and for rejected answers."""
    curves = (Curve("train", f"{prefix}/chosen", "chosen"), Curve("train", f"{prefix}/rejected", "rejected", ":"))
    return Panel(key, title, curves, usual)


def _sources(metrics: Sequence[str]) -> list[Panel]:
    """A panel for each source of a mixture, whose losses `loss/NAME` are."""
    return [
        _both(metric, f"loss on {metric.partition('/')[2]}", usual=len(metrics) <= _USUAL_SOURCES) for metric in metrics
    ]


def _score(path: str) -> Panel:
    """A panel with a figure of an evaluation, [GROUP/]TASK/METRIC. The tasks of a group may be many."""
    *group, task, metric = path.split("/")
    return Panel(f"eval/{path}", f"{task}: {metric}", (Curve("eval", path),), usual=not group)


LEARNING = (
    _both("loss", "loss", usual=True, large=True, by_task=True),
    _both("bits_per_byte", "bits per byte", by_task=True),
    Panel("lr", "learning rate", (Curve("train", "lr"),), usual=True, by_task=True),
    Panel("grad_norm", "gradient norm, before clipping", (Curve("train", "grad_norm"),), usual=True),
)
SPEED = (
    Panel("tokens_per_sec", "tokens per second", (Curve("train", "tokens_per_sec"),), usual=True),
    Panel("mfu", "MFU, %", (Curve("train", "mfu", factor=100),), usual=True),
    Panel("mfu_seed", "MFU by llm-zero2all's formula, %", (Curve("train", "mfu_seed", factor=100),)),
    Panel("dt", "seconds a step", (Curve("train", "dt"),)),
    Panel("data_wait", "waiting for data, ms a step", (Curve("train", "data_wait", factor=1000),), usual=True),
    Panel("comm_wait", "communication not hidden, ms a step",
          (Curve("train", "comm_wait", factor=1000),), usual=True),
)  # fmt: skip
COMPRESSION = (
    Panel("compression", "compression: error left for later", (Curve("compression", "mean_relative_error"),),
          usual=True),
    Panel("compression_ratio", "compression ratio", (Curve("compression", "ratio"),)),
)  # fmt: skip
EXPERTS = (
    Panel("expert_load", "expert load, 1 if even",
          (Curve("experts", "load_highest", "busiest"), Curve("experts", "load_lowest", "idlest", ":")), usual=True),
    Panel("balance_loss", "balance loss, 1 if even", (Curve("experts", "balance_loss"),), usual=True),
    Panel("router_entropy", "router entropy, nats", (Curve("experts", "entropy"),), usual=True),
    Panel("z_loss", "router z-loss", (Curve("experts", "z_loss"),)),
)  # fmt: skip
DPO = (
    _pair("rewards", "DPO rewards", "rewards", usual=True),
    _both("rewards/margins", "DPO margin", usual=True, key="margins"),
    _both("rewards/accuracies", "DPO accuracy", usual=True, key="accuracies"),
    _pair("logps", "log-probabilities", "logps"),
)
SAVING = (Panel("held_up", "saving: training held up, ms", (Curve("save", "held_up", factor=1000),)),)
PANELS = (*LEARNING, *SPEED, *COMPRESSION, *EXPERTS, *DPO, *SAVING)
"""All known panels, in the order in which they are listed and drawn."""
_USUAL_SOURCES = 6
"""With more sources in a mixture, their panels are shown on request alone."""
_HIDDEN = {"step", "time", "launch", "tokens"}
_TASKS = {"pretrain": "pretraining", "sft": "SFT", "dpo": "DPO"}


def available(snapshots: Sequence[Snapshot]) -> list[Panel]:
    """The panels that have something to show: the known ones, then the scores of evaluations, then one for each metric
    that only these runs have."""
    present = {
        (table, metric)
        for snapshot in snapshots
        for table, columns in snapshot.tables.items()
        for metric in columns
        if metric not in _HIDDEN
    }
    losses = sorted({metric for table, metric in present if table in ("train", "valid") and metric[:5] == "loss/"})
    panels = [*PANELS, *_sources(losses)]
    known = {(curve.table, curve.metric) for panel in panels for curve in panel.curves}
    found = [panel for panel in panels if any((curve.table, curve.metric) in present for curve in panel.curves)]
    others = sorted(metric for table, metric in present - known if table == "train")
    more = sorted((table, metric) for table, metric in present - known if table != "train")
    more = [(table, metric) for table, metric in more if not (table == "valid" and ("train", metric) in present)]
    # What an evaluation records besides has no course.
    scores = [metric for table, metric in more if table == "eval" and "/" in metric]
    more = [(table, metric) for table, metric in more if table != "eval"]
    return [
        *found,
        *map(_score, scores),
        *(_both(metric, metric) for metric in others),
        *(Panel(f"{table}/{metric}", f"{table}/{metric}", (Curve(table, metric),)) for table, metric in more),
    ]


def choose(found: list[Panel], view: View) -> list[Panel]:
    """The panels that the view names, or the usual ones if it names none."""
    if not view.panels:
        return [panel for panel in found if panel.usual]
    if view.panels == ("all",):
        return found
    return [panel for panel in found if panel.key in view.panels]


def chosen_panels(runs: Sequence[ShownRun], view: View) -> list[Panel]:
    """The panels that the view shows for these runs: one for each task where the task matters; a single one if it has
    the picture to itself."""
    chosen = choose(available([run.snapshot for run in runs]), view)
    found = [part for panel in chosen for part in _parts(panel, runs)]
    return [panel for panel in found if panel.key == view.alone] or found


def runs_of(panel: Panel, runs: Sequence[ShownRun]) -> list[ShownRun]:
    """The runs that have something to show in a panel."""
    return [
        run for run in runs
        if panel.task in (None, _task_of(run.snapshot))
        and any(curve.metric in run.snapshot.tables.get(curve.table, {}) for curve in panel.curves)
    ]  # fmt: skip


def _parts(panel: Panel, runs: Sequence[ShownRun]) -> list[Panel]:
    """The panel, or one panel for each task of its runs."""
    tasks = list(dict.fromkeys(_task_of(run.snapshot) for run in runs_of(panel, runs))) if panel.by_task else []
    if len(tasks) < 2:
        return [panel]
    order = {task: place for place, task in enumerate(_TASKS)}
    tasks.sort(key=lambda task: (order.get(task, len(order)), task))
    return [replace(panel, key=f"{panel.key} ({task})", task=task) for task in tasks]


def _task_of(snapshot: Snapshot) -> str:
    """The run's task. If its log does not name one, the metrics tell."""
    return snapshot.task or ("dpo" if "rewards/margins" in snapshot.tables.get("train", {}) else "pretrain")


def title_of(panel: Panel, language: str) -> str:
    """The panel's title, with the task if the panel is one of several."""
    text = translate(panel.title, language)
    if panel.task is None:
        return text
    return translate("{}, {}", language).format(text, translate(_TASKS.get(panel.task, panel.task), language))


def left_out(runs: Sequence[ShownRun], num_panels: int, num_drawn: int, language: str) -> list[str]:
    """One sentence for each thing in the runs' logs that the drawn panels do not show."""
    found = [
        (f"{run.label}: " if len(runs) > 1 else "") + text
        for run in runs
        for text in left_out_of(run.snapshot, language)
    ]  # fmt: skip
    if num_panels > num_drawn:
        found.append(translate("panels but the first {}", language).format(num_drawn))
    return found


def left_out_of(snapshot: Snapshot, language: str) -> list[str]:
    """One sentence for each thing in a run's log that its snapshot lacks."""
    return [translate(text, language).format(*values) for text, values in snapshot.left_out]

"""A run directory as a card needs it: its configuration, its log, and the runs that it began with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.report.launches import Launch, launches_of
from evaluation.report.words import short
from runs.history import RunHistory, Snapshot
from runs.layout import CKPT_DIR, RunPaths
from runs.reslog import VERSION, all_records, lines_of, read_reslog
from utils.paths import absent
from utils.small_files import parse_yaml, read_small

_LONGEST_CONFIG = 1 << 20
_MOST_PARENTS = 8


@dataclass(frozen=True)
class Run:
    """What a run left. Its files may hold anything."""

    path: Path
    config: Mapping[str, Any]
    """Flags by their names; {} if config.yaml is missing or damaged."""
    derived: Mapping[str, Any]
    """What these came to: dtype, world_size, the model's shape."""
    snapshot: Snapshot
    """The log's numbers, without superseded records."""
    launches: Sequence[Launch]
    records: Sequence[dict]
    """Those of texts that the model wrote, of evaluations, and of saves and evaluations that failed; without superseded
    ones."""
    problems: Sequence[str] = field(default=())

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.path)

    @property
    def start(self) -> Mapping[str, Any]:
        """The newest start record; {} if there is none."""
        return self.launches[-1].start if self.launches else {}

    @property
    def task(self) -> str:
        return str(self.config.get("task_type") or self.start.get("task") or "")

    def found(self, path: str | Path) -> Path:
        """A path as the run was given it: relative to the directory in which it was started, which a card may not
        know. It is looked for from this directory, and from each above the run."""
        given = Path(path)
        if given.is_absolute() or given.exists():
            return given
        return next((parent / given for parent in self.path.resolve().parents if (parent / given).exists()), given)

    def last(self, table: str, metric: str) -> float | None:
        """Newest value of a metric."""
        values = self.snapshot.tables.get(table, {}).get(metric)
        return None if values is None or not len(values) else float(values[-1])


def is_run(path: Path) -> bool:
    paths = RunPaths(path)
    return paths.mark.exists() or paths.config.exists() or paths.reslog.exists()


def read_run(path: Path) -> Run:
    """What a run left, as far as it can be read.

    Raises:
        ValueError: it is no run.
    """
    if not path.exists():
        raise ValueError(absent(path))
    if not is_run(path):
        raise ValueError(f"{path} is not a run directory: give the --out_dir of a training")
    problems: list[str] = []
    config = _read_config(path, problems)
    snapshot, launches, records = _read_log(path, problems)
    derived = config.get("derived")
    flags = {name: value for name, value in config.items() if name != "derived"}
    return Run(path, flags, derived if isinstance(derived, dict) else {}, snapshot, launches, records, tuple(problems))


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    file = RunPaths(path).config
    try:
        found = parse_yaml(read_small(file, _LONGEST_CONFIG))
    except FileNotFoundError:
        problems.append(f"{short(file)} is missing: what was trained with which options is not known")
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{short(file)} cannot be read: {getattr(error, 'strerror', None) or error}")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{short(file)} holds no configuration")
        return {}
    return {str(name): value for name, value in found.items()}


def _read_log(path: Path, problems: list[str]) -> tuple[Snapshot, list[Launch], list[dict]]:
    file = RunPaths(path).reslog
    history = RunHistory()
    try:
        with file.open("rb") as opened:
            history.feed(lines_of(opened))
        launches = launches_of(all_records(file))
        records = read_reslog(file, names=("sample", "eval", "save_failed", "eval_failed"))
    except FileNotFoundError:
        problems.append(f"{short(file)} is missing: there are no curves, no times and no launches to show")
        return Snapshot(), [], []
    except OSError as error:
        problems.append(f"{short(file)} cannot be read: {error.strerror}")
        return Snapshot(), [], []
    snapshot = history.snapshot()
    problems += [f"not shown of {short(file)}: {text.format(*values)}" for text, values in snapshot.left_out]
    if not snapshot.tables.get("train"):
        problems.append(f"{short(file)} records no step yet")
    if launches:
        version = launches[-1].start.get("version")
        if version != VERSION:
            problems.append(
                f"{short(file)} was written in format version {version}, and this program knows {VERSION}: some "
                f"figures may be missing"
            )
    return snapshot, launches, records


def ancestors_of(run: Run) -> tuple[list[Run], str]:
    """The runs that a run's weights come from, the latest first; and the sentence on where the chain ends: the folder
    that the first of them began with, a run that cannot be found, or new weights."""
    found: list[Run] = []
    seen = {run.path.resolve()}
    child = run
    while len(found) < _MOST_PARENTS:
        given = child.config.get("init_from")
        if not isinstance(given, str) or not given:
            return found, "" if given is None else f"the run {child.name} began with new weights"
        parent = run_of(child.found(given))
        if parent is None:
            place = child.found(given)
            what = "a folder that is no run of ours" if place.exists() else "which is not there any more"
            return found, f"{child.name} began with the weights of {short(given)}, {what}"
        if parent.resolve() in seen:
            return found, f"{child.name} says that it began with itself or with a run that came after it"
        seen.add(parent.resolve())
        child = read_run(parent)
        found.append(child)
    return found, "and more runs before"


def run_of(path: Path) -> Path | None:
    """The run that a path names, or that a checkpoint lies in; None if it is neither."""
    candidates: Iterator[Path] = iter([path, path.resolve().parent.parent])
    if is_run(next(candidates)):
        return path
    above = next(candidates)
    return above if path.resolve().parent.name == CKPT_DIR and is_run(above) else None

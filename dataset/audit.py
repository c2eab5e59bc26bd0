"""Prove from a run's log that no sample was repeated or skipped, whatever happened to the run.

    python -m dataset.audit RUN

Each step recorded the positions of the stream that it took, and a digest of the sample ids and tokens that were really
in its micro-batches, summed over all ranks. The audit walks through the valid records (those of steps that a later
launch repeated are superseded), across crashes, resumes and changes of world size. It checks that

- the positions follow one another without gap or overlap, from 0 to the last step, with the due number in each step;
- each launch began exactly at its checkpoint;
- every digest equals the one that follows from the order, (seed, position) -> sample, and the `.bin` files;
- a mixture goes on, in every source, where the one before has stopped.

The order visits every sample once per epoch. So if each position was taken once, each sample was taken once per
epoch.

Exit codes: 0 proven; 1 something is wrong; 2 it cannot be checked.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset.loader import rows_digest
from dataset.mixture import MixtureDataset, given_before
from dataset.mixture_spec import directories_of, is_mixture
from dataset.opening import TaskDataset, kind_of, mixture_of_record, open_dataset
from dataset.trained_on import read_trained_on
from runs.layout import RESLOG_NAME, RunPaths
from runs.reslog import count_launches, read_reslog
from utils.arguments import Parser
from utils.paths import a_path, absent
from utils.terminal import run_main

_ROWS_AT_ONCE = 512
_MOST_FINDINGS = 10


@dataclass
class Audit:
    """Findings so far."""

    steps: int = 0
    records: int = 0
    samples: int = 0
    segments: list[str] = field(default_factory=list)
    """Lines about the streams (seed and data) that the run used, one for each."""
    world_sizes: list[int] = field(default_factory=list)
    left_out: list[tuple[int, int]] = field(default_factory=list)
    """First and last position of each stretch that a launch left out on request (--resume_at_sample)."""
    findings: list[str] = field(default_factory=list)


def recomputed_digest(dataset: TaskDataset, seed: int, first: int, last: int) -> int:
    """Digest of the positions first..last of the stream, computed from the order and the files."""
    total = 0
    for start in range(first, last + 1, _ROWS_AT_ONCE):
        positions = np.arange(start, min(start + _ROWS_AT_ONCE, last + 1), dtype=np.int64)
        sample_ids = dataset.ids_at(seed, positions)
        total += rows_digest(sample_ids, dataset.input_rows(sample_ids))
    return total % (1 << 64)


class _Walk:
    """Walk through the valid records, in order."""

    def __init__(self, datasets: dict[str, TaskDataset]):
        self._datasets, self.audit = datasets, Audit()
        self._start: dict | None = None
        self._step = self._next = 0

    def take(self, record: dict) -> None:
        if record["name"] == "start":
            self._take_start(record)
        else:
            self._take_step(record)

    def _take_start(self, start: dict) -> None:
        before, self._start = self._start, start
        same_stream = before is not None and self._goes_on(before, start)
        if start["step"] != self._step:
            self._find(
                f"launch {start['attempt']} begins after step {start['step']}, but the records that stand end with "
                f"step {self._step}"
            )
        # --restart_data allows another stream, which is taken from its beginning.
        due = self._next if same_stream else 0
        if start.get("left_out") and start["left_out"][0] == due:
            due = start["left_out"][1] + 1
            self.audit.left_out.append(tuple(start["left_out"]))
        if start["samples_consumed"] != due:
            self._find(
                f"launch {start['attempt']} begins at position {start['samples_consumed']} of the stream, where {due} "
                f"was due"
            )
        self._step, self._next = start["step"], start["samples_consumed"]
        self.audit.world_sizes.append(start["world_size"])
        dataset = self._datasets[start["data"]]
        if isinstance(dataset, MixtureDataset):
            dataset.take(start["mixture"])
        if not same_stream or before is None or before.get("mixture") != start.get("mixture"):
            self.audit.segments.append(
                f"from step {start['step']}: seed {start['seed']}, {dataset.description()} ({start['data'][:12]})"
            )

    def _goes_on(self, before: dict, start: dict) -> bool:
        """Whether a launch goes on with the stream of the one before."""
        if before["seed"] != start["seed"]:
            return False
        if "mixture" not in start:
            return before["data"] == start["data"] and "mixture" not in before
        if start["samples_consumed"] == 0 and self._next:
            return False
        given = given_before(before, self._next)
        marks = [source["fingerprint"] for source in start["mixture"]["sources"]]
        taken_up = given_before(start, self._next) if before.get("mixture") != start["mixture"] else given
        for mark in marks:
            if taken_up.get(mark, 0) != given.get(mark, 0):
                self._find(
                    f"launch {start['attempt']} goes on in source {mark[:12]} at its sample {taken_up.get(mark, 0)}, "
                    f"where {given.get(mark, 0)} were given before"
                )
        return True

    def close(self) -> None:
        """Note what each source has given."""
        if self._start is None or "mixture" not in self._start:
            return
        counts = given_before(self._start, self._next)
        total = max(1, sum(counts.values()))
        told = [
            f"{source['name']} {counts[source['fingerprint']]:,} ({counts[source['fingerprint']] / total:.2%})"
            for source in self._start["mixture"]["sources"]
        ]
        self.audit.segments.append(f"samples of each source: {', '.join(told)}")

    def _take_step(self, record: dict) -> None:
        first, last = record["samples"]
        start, step = self._start, record["step"]
        assert start is not None  # The first record of a log is a start.
        if first != self._next:
            word = "skipped" if first > self._next else "repeated"
            self._find(
                f"step {step}: begins at position {first} of the stream where {self._next} was due: "
                f"{abs(first - self._next)} positions {word}"
            )
        due = (step - self._step) * start["global_batch_size"]
        if last - first + 1 != due:
            self._find(f"step {step}: took {last - first + 1} positions since step {self._step}, where {due} were due")
        expected = recomputed_digest(self._datasets[start["data"]], start["seed"], first, last)
        if record["digest"] != f"{expected:016x}":
            self._find(
                f"step {step}: the digest {record['digest']} is not {expected:016x}, that of positions {first} to "
                f"{last}: the micro-batches held other samples or tokens"
            )
        self.audit.records += 1
        self.audit.samples += last - first + 1
        self._step, self._next = step, last + 1
        self.audit.steps = step

    def _find(self, finding: str) -> None:
        self.audit.findings.append(finding)


def audit_run(run_dir: Path, data_dirs: list[Path], show_progress: bool = False) -> Audit:
    """Walk through a run's log.

    Args:
        data_dirs: directories besides the run's own in which the data of its segments may lie.
    Raises:
        ValueError: there is no log or no record in it, or the data of a segment is missing.
    """
    records = _records_of(run_dir)
    run = read_trained_on(run_dir)
    starts = [record for record in records if record["name"] == "start"]
    layouts = {(start["max_seq_len"], start["packing"]) for start in starts}
    datasets: dict[str, TaskDataset] = {}
    problems = []
    own = run.dirs["train"]
    # A run may have begun with one of a mixture's directories.
    before = directories_of(own) if is_mixture(own) else []
    for directory in [own, *before, *data_dirs]:
        for length, packing in layouts:
            try:
                dataset = open_dataset(kind_of(directory), directory, "train", length, packing=packing)
            except ValueError as error:
                problems.append(str(error))
            else:
                datasets[dataset.fingerprint] = dataset
    for start in starts:
        # A file that names a mixture may have changed since; the record says what it named.
        if "mixture" in start and start["data"] not in datasets:
            try:
                mixture = mixture_of_record(start, own)
            except ValueError as error:
                problems.append(str(error))
            else:
                datasets[mixture.fingerprint] = mixture
    missing = {start["data"] for start in starts} - set(datasets)
    if missing:
        reason = f": {problems[0]}" if problems else ""
        raise ValueError(
            f"the data {', '.join(sorted(name[:12] for name in missing))} that the run used is in none of the "
            f"directories looked at{reason}; name its directory with --data_dir"
        )
    walk = _Walk(datasets)
    for record in tqdm(records, unit="record", desc="auditing", disable=not show_progress or None):
        walk.take(record)
    walk.close()
    return walk.audit


def _records_of(run_dir: Path) -> list[dict]:
    path = RunPaths(run_dir).reslog
    if not run_dir.exists():
        raise ValueError(absent(run_dir))
    if not path.exists():
        raise ValueError(f"{run_dir} holds no {RESLOG_NAME}: it is not a run directory")
    records = [record for record in read_reslog(path) if record["name"] in ("start", "train")]
    if not any(record["name"] == "train" for record in records):
        raise ValueError(f"{path} records no step yet")
    needed = {
        "start": ("attempt", "step", "samples_consumed", "world_size", "seed", "data", "max_seq_len",
                  "global_batch_size", "task", "packing"),
        "train": ("step", "samples", "digest"),
    }  # fmt: skip
    for record in records:
        lacking = [key for key in needed[record["name"]] if key not in record]
        if lacking or records[0]["name"] != "start":
            raise ValueError(
                f"{path} was not written by a run of this version: {', '.join(lacking) or 'no start'} missing"
            )
    return records


def report(run_dir: Path, audit: Audit, seconds: float) -> Iterator[str]:
    launches = count_launches(RunPaths(run_dir).reslog)
    sizes = ", ".join(map(str, audit.world_sizes))
    yield f"{audit.steps} steps, {audit.samples:,} samples, {launches} launches (processes: {sizes})"
    yield from audit.segments
    yield from (f"left out on request: positions {first} to {last}" for first, last in audit.left_out)
    if audit.findings:
        yield from (f"WRONG {finding}" for finding in audit.findings[:_MOST_FINDINGS])
        if len(audit.findings) > _MOST_FINDINGS:
            yield f"and {len(audit.findings) - _MOST_FINDINGS} more"
    else:
        other = "other " if audit.left_out else ""
        yield (
            f"every {other}position was taken once, in order, and the digests of all {audit.records} records agree "
            f"with the files ({seconds:.1f} s)"
        )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m dataset.audit", description="Prove that no sample of a run was repeated or skipped."
    )
    parser.add_argument("run", type=a_path, help="run directory (--out_dir of the training)")
    parser.add_argument(
        "--data_dir",
        type=a_path,
        action="append",
        default=[],
        help="where the data lies, if it was moved or changed during the run",
    )
    args = parser.parse_args(argv)
    started = time.monotonic()
    run_dir = Path(args.run)
    try:
        audit = audit_run(run_dir, [Path(directory) for directory in args.data_dir], show_progress=True)
    except (ValueError, OSError) as error:
        print(f"audit: {error}", file=sys.stderr)
        return 2
    for line in report(run_dir, audit, time.monotonic() - started):
        print(line)
    return 1 if audit.findings else 0


if __name__ == "__main__":
    run_main(main, goes_on=True)

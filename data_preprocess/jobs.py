"""Jobs: work through a corpus unit by unit, on many processes, so that a killed run goes on where it stopped.

The corpus is cut into units by its files alone (readers/), and a unit into parts of about `shard_bytes` of text. A
part's shards are named after the unit's content, the tokenizer and the options. A record that is written after them
says that they are whole, and the same command, given again, skips the parts that have one. The content of a part does
not depend on the number of processes.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from data_preprocess.readers import Corpus, Unit, find_units, print_left_out
from data_preprocess.shards import NOTES_DIR, PartRecord, reasons, sole_writer, write_manifest
from tokenizer import Tokenizer, load_tokenizer
from utils.files import atomic_write_json

_SECONDS_A_LINE = 30.0


@dataclass(frozen=True)
class Job(ABC):
    """Work to be done with each unit. It is sent to every worker."""

    corpus: Corpus
    output_dir: str
    tokenizer_dir: str
    valid_ratio: float = 0.01
    shard_bytes: int = 256_000_000
    """Bytes of text after which a part ends, at the end of a document."""
    max_bad_records: int = 100

    @abstractmethod
    def options(self) -> object:
        """Everything besides the unit and the tokenizer that decides a part's content, in a form that JSON can hold."""

    def key(self, tokenizer: Tokenizer) -> list:
        """Everything besides the unit that decides a part's content, in a form that JSON can hold."""
        return [tokenizer.fingerprint, self.options()]

    def begin(self, tokenizer: Tokenizer) -> None:  # noqa: B027 (most jobs have nothing to do)
        """Prepare the work; called once, before any unit.

        Raises:
            ValueError: this tokenizer cannot be used.
        """

    @abstractmethod
    def items(
        self, unit: Unit, tokenizer: Tokenizer, done: int, num_threads: int, on_bytes: Callable[[int], None]
    ) -> Iterator:
        """Items of a unit, in order, from number `done` on."""

    @abstractmethod
    def write_part(self, name: str, tokenizer: Tokenizer, items: Iterator, bad_before: int) -> PartRecord:
        """Take items up to the end of a part, and write them as shards of this name.

        Args:
            bad_before: the unit's bad records so far.
        """

    @abstractmethod
    def check_shard(self, path: Path) -> None:
        """Raise ValueError or OSError if a shard is not whole."""

    def manifest(self) -> dict:
        """Entries of the manifest besides shards and totals."""
        return {}

    def check_bad_records(self, count: int, examples: Sequence[str]) -> None:
        """Raise ValueError if more records are unreadable than allowed."""
        if count > self.max_bad_records:
            counted, _, why = reasons(count, examples).partition(", ")
            raise ValueError(f"{counted}, more than --max_bad_records {self.max_bad_records}; {why}")


@functools.cache
def _tokenizer(directory: str) -> Tokenizer:
    """The process's tokenizer, loaded once, however many units it works on."""
    return load_tokenizer(directory)


def _finished_part(job: Job, name: str) -> PartRecord | None:
    """Record of a part that an earlier run completed; None if there is none, or a shard is not whole."""
    output = Path(job.output_dir)
    try:
        record = PartRecord(**json.loads((output / NOTES_DIR / f"{name}.json").read_text()))
        for file in record.shards.values():
            job.check_shard(output / file)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return record


def process_unit(
    job: Job, unit: Unit, num_threads: int = 1, on_bytes: Callable[[int], None] = lambda _: None
) -> list[PartRecord]:
    """Work on a unit from where an earlier run stopped, and return the records of all its parts.

    Raises:
        ValueError: the work failed; the sentence names the file and the record.
    """
    tokenizer = _tokenizer(job.tokenizer_dir)
    key = json.dumps([unit.fingerprint(job.corpus), *job.key(tokenizer)])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    records: list[PartRecord] = []
    while record := _finished_part(job, f"{name}-{len(records)}"):
        records.append(record)
        if record.is_last:
            on_bytes(unit.num_bytes)
            return records
    items = job.items(unit, tokenizer, sum(record.items for record in records), num_threads, on_bytes)
    while not (records and records[-1].is_last):
        part = f"{name}-{len(records)}"
        record = job.write_part(part, tokenizer, items, sum(record.bad_records for record in records))
        atomic_write_json(Path(job.output_dir) / NOTES_DIR / f"{part}.json", asdict(record))
        records.append(record)
    return records


class _Worker:
    """State of a worker process besides its units; set when it starts."""

    bytes_read = None
    """Bytes that all workers together have read: a multiprocessing.Value."""


def _start_worker(bytes_read: object, num_threads: int) -> None:
    """Set up a worker. It ends with its parent, however that ends, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Number of threads that the tokenizer takes where it may.
    os.environ["RAYON_NUM_THREADS"] = str(num_threads)
    _Worker.bytes_read = bytes_read
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work_on_unit(job: Job, unit: Unit, num_threads: int) -> list[PartRecord]:
    """Work on a unit in a worker process, counting the bytes that are read."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_threads > 1 else "false"

    def count(num_bytes: int) -> None:
        with _Worker.bytes_read.get_lock():
            _Worker.bytes_read.value += num_bytes

    return process_unit(job, unit, num_threads, count)


@contextmanager
def _ctrl_c_when_asked() -> Iterator[Callable[[], None]]:
    """Context with a function that raises KeyboardInterrupt if Ctrl-C was pressed. Raised inside concurrent.futures,
    the exception could leave a lock taken for ever."""
    pressed = threading.Event()

    def ask() -> None:
        if pressed.is_set():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield ask
    finally:
        signal.signal(signal.SIGINT, before)
    ask()


def _process_units(
    job: Job, units: list[Unit], num_workers: int, raise_interrupt: Callable[[], None]
) -> list[PartRecord]:
    """Spread the units over processes, and return the records of their parts, in the order of the units.

    Raises:
        ValueError: a worker failed, with the name of its file; or more records than allowed are unreadable.
        OSError: a file could not be read or written now, with its name.
    """
    context = multiprocessing.get_context("spawn")  # Forking a process that runs the tokenizer's threads can deadlock.
    bytes_read = context.Value("q", 0)
    progress = _Progress(sum(unit.num_bytes for unit in units))
    records: dict[int, list[PartRecord]] = {}
    bad_records = 0
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (bytes_read, num_workers))
    try:
        # A large file that cannot be cut would keep the others waiting. So it goes first, and takes all threads.
        largest_first = sorted(range(len(units)), key=lambda index: -units[index].num_bytes)
        futures = {}
        for index in largest_first:
            threads = num_workers if units[index].num_bytes > 2 * job.shard_bytes else 1
            futures[pool.submit(_work_on_unit, job, units[index], threads)] = index
        waiting = set(futures)
        while waiting:
            raise_interrupt()
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            progress.show(bytes_read.value)
            for future in done:
                index = futures[future]
                try:
                    parts = records[index] = future.result()
                except ValueError as error:
                    raise ValueError(_with_file(str(error), units[index])) from error
                except OSError as error:
                    # Not a mistake of the user: a training that tokenizes its records should be tried again.
                    raise OSError(error.errno, _with_file(error.strerror or str(error), units[index])) from error
                bad_records += sum(part.bad_records for part in parts)
                examples = [example for part in parts for example in part.bad_examples]
                job.check_bad_records(bad_records, examples)
    except BaseException:
        # Finished parts have their records; waiting for the others would only keep the user.
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        progress.close()
    return [part for index in range(len(units)) for part in records[index]]


def _with_file(sentence: str, unit: Unit) -> str:
    """The sentence with the name of the file, which a failing disk, for one, does not give."""
    if any(piece.path in sentence for piece in unit.pieces):
        return sentence
    first, last = unit.pieces[0].path, unit.pieces[-1].path
    return f"{sentence} (in {first})" if first == last else f"{sentence} (between {first} and {last})"


class _Progress:
    """Progress in MB, MB/s and time left: a bar on a terminal, otherwise a line every half minute. The rate is that
    since the line before, because the parts that an earlier run completed go by in a moment."""

    def __init__(self, total_bytes: int):
        self._total, self._last_time, self._last_bytes = total_bytes, time.monotonic(), 0
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=None)

    def show(self, done_bytes: int) -> None:
        done_bytes = min(done_bytes, self._total)
        self._bar.update(done_bytes - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and now - self._last_time >= _SECONDS_A_LINE and done_bytes > self._last_bytes:
            rate = (done_bytes - self._last_bytes) / (now - self._last_time)
            self._last_time, self._last_bytes = now, done_bytes
            print(
                f"tokenizing: {done_bytes / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, "
                f"{(self._total - done_bytes) / rate / 60:.0f} min left",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def close(self) -> None:
        self._bar.close()


def process_corpus(job: Job, num_workers: int = 1) -> dict:
    """Do a whole job and write its manifest, which lists the shards in the order of their inputs.

    Args:
        num_workers: number of processes; 0 works in this one, where the work is too small to start others for it.
    Raises:
        ValueError: nothing to read, nothing held out, or more unreadable records than allowed.
    """
    output = Path(job.output_dir)
    if not 0.0 <= job.valid_ratio <= 1.0:
        raise ValueError(f"--valid_ratio must be at least 0 and at most 1, got {job.valid_ratio}")
    if not 1 <= job.shard_bytes < 2**63 or num_workers < 0:
        raise ValueError("--shard_mb and --num_workers must be positive")
    units, left_out = find_units(job.corpus, job.shard_bytes)
    print_left_out(left_out)
    tokenizer = _tokenizer(job.tokenizer_dir)
    job.begin(tokenizer)
    with sole_writer(output):
        if num_workers:
            with _ctrl_c_when_asked() as raise_interrupt:
                records = _process_units(job, units, num_workers, raise_interrupt)
        else:
            records = [record for unit in units for record in process_unit(job, unit)]
            examples = [example for record in records for example in record.bad_examples]
            job.check_bad_records(sum(record.bad_records for record in records), examples)
        return write_manifest(output, tokenizer, job.valid_ratio, records, job.corpus.root, job.manifest())


def run_command(name: str, work: Callable[[], dict], print_summary: Callable[[dict, float], None]) -> int:
    """Run a command's work, with sentences instead of tracebacks, and return the exit code.

    Args:
        work: does it and returns the manifest.
        print_summary: receives the manifest and the seconds that it took.
    """
    started = time.monotonic()
    try:
        manifest = work()
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print(
            f"{name}: a worker process was killed, perhaps for memory; the same command goes on where it stopped, "
            "with a smaller --num_workers if it was memory",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    print_summary(manifest, time.monotonic() - started)
    return 0

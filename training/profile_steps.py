"""--profile_steps: traces of some steps by torch.profiler, one a rank, and a picture of one step (viewer/timeline.py).

A step's parts are ranges that the training names (parallel/spans.py). Nothing here may end a run.
"""

import gzip
import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from runs import traces
from viewer import timeline

logger = logging.getLogger(__name__)


class StepProfile:
    """Traces the wanted steps as they come.

    Args:
        span: first and last step; None: none.
        about: what the trace says of the run, see traces.ABOUT.
        aside: context for long work that is not part of the training.
    """

    def __init__(
        self,
        span: tuple[int, int] | None,
        directory: Path,
        device: torch.device,
        about: dict,
        aside: Callable[[], AbstractContextManager],
    ):
        self._span, self._directory, self._device, self._about, self._aside = span, directory, device, about, aside
        self._rank = about["rank"]
        self._profiler: profile | None = None
        self._traced: list[int] = []

    def begin(self, step: int) -> None:
        """The run is at `step`: say so if the wanted steps are over."""
        if self._span is not None and step >= self._span[1]:
            if self._rank == 0:
                logger.info(
                    "nothing is profiled: the run is at step %d, --profile_steps asks for %d to %d", step, *self._span
                )
            self._span = None

    def step(self, number: int, work: Callable[[], bool]) -> bool:
        """Do `work`, which is step `number`, and return its result: whether the step was done."""
        if self._span is None or not self._span[0] <= number <= self._span[1]:
            return work()
        if self._profiler is None and not self._start():
            return work()
        with record_function(f"step {number}"):
            is_done = work()
        if is_done:
            self._traced.append(number)
        if number == self._span[1]:
            self.finish()
        return is_done

    def finish(self) -> None:
        """Write the traced steps; at the latest when the run ends."""
        if self._span is None:
            return
        (first, last), self._span = self._span, None
        if self._profiler is None:
            if self._rank == 0:
                logger.info("nothing was profiled: the run ended before step %d", first)
            return
        profiler, self._profiler = self._profiler, None
        with self._aside():
            try:
                profiler.stop()
                if self._traced:
                    self._write(profiler)
            # The training goes on, whatever a profiler, a disk or a drawing library does.
            except Exception as error:
                logger.warning("the profile of steps %d to %d is not complete: %s", first, last, error)

    def _start(self) -> bool:
        """Start the profiler. Returns False if that is impossible; then no step is traced."""
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with self._aside():
            try:
                # A private name: without it the run goes on without a profile.
                from torch._C._profiler import _ExperimentalConfig

                # Also the threads that exist already: the comm stream's, the loader's.
                everywhere = _ExperimentalConfig(profile_all_threads=True)
                profiler = profile(activities=activities, experimental_config=everywhere, acc_events=True)
                profiler.start()
                profiler.add_metadata_json(traces.ABOUT, json.dumps(self._about))
                self._profiler = profiler
            except Exception as error:
                self._span = None
                logger.warning("steps are not profiled: %s", error)
        return self._profiler is not None

    def _write(self, profiler: profile) -> None:
        self._directory.mkdir(exist_ok=True)
        name = f"steps-{self._traced[0]}-{self._traced[-1]}"
        trace, picture = self._directory / f"{name}-rank-{self._rank}.json.gz", self._directory / f"{name}.png"
        write_trace(profiler, trace)
        if self._rank != 0:
            return
        logger.info("profile: %s (opens in https://ui.perfetto.dev), one a rank", trace)
        try:
            timeline.draw([traces.read_trace(trace)], picture)
        except ImportError:
            logger.info("for a picture of it: pip install matplotlib, then python -m utils.timeline %s --png %s",
                        trace, picture)  # fmt: skip
        else:
            logger.info("profile: %s shows where a step's time goes", picture)


def write_trace(profiler: profile, path: Path) -> None:
    """Write a gzipped Chrome trace, whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    plain, packed = (path.with_name(f".{path.name}.{kind}") for kind in ("json", "part"))
    try:
        profiler.export_chrome_trace(str(plain))
        with open(plain, "rb") as source, gzip.open(packed, "wb", compresslevel=4) as target:
            shutil.copyfileobj(source, target, 1 << 20)
            # The exporter does not report a full disk.
            source.seek(max(0, source.tell() - 16))
            if not source.read().rstrip().endswith(b"}"):
                raise OSError(f"{path} was cut off: is the disk full?")
        os.replace(packed, path)
    finally:
        for part in (plain, packed):
            part.unlink(missing_ok=True)

"""A model and its engine, opened by the flags of a command: in one process, or on ranks that share the model."""

import argparse
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint.choosing import resolve_checkpoint_dir
from model import Decoder
from model.config import ModelConfig
from model.divided import Cutter
from optimizer.mixed_precision import resolve_dtype
from parallel.context import destroy_context
from serving.engine import Engine, EngineOptions
from serving.invariant import InvariantRunner
from serving.loading import Served, load
from serving.lockstep import Lockstep
from serving.pool import num_blocks_of
from serving.ranks import Ranks, open_ranks, require_ranks
from serving.runner import Runner

OptionsOf = Callable[[Decoder], EngineOptions]


class Opened(NamedTuple):
    """What answers requests."""

    served: Served
    engine: Engine
    lockstep: Lockstep | None = None
    """The other ranks' way of following, if there are others."""


@contextmanager
def opened(
    args: argparse.Namespace, adapters: Mapping[str, Path], options: EngineOptions | OptionsOf, first_ends: bool = False
) -> Iterator[Opened | None]:
    """Load the model of the flags (`add_model_flags`), ready to answer. Of several ranks, the first one gets it; the
    others do their part until it has ended, and get None.

    Args:
        options: or a function from the model to them.
        first_ends: SIGTERM, which launchers send to all ranks, means the first one. The others ignore it, as it may
            have answers to finish. (A SIGINT always means the first one, which may end an answer, and no more.)
    Raises:
        ValueError: flags or files are wrong.
        OSError: a disk or a network fails, and may be back later.
    """
    sizes = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    shares_model = require_ranks(*sizes)
    if shares_model and args.load_in_4bit:
        raise ValueError("--load_in_4bit keeps matrices whole on every process: leave it out")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but there is no CUDA here: use --device cpu")
    if not shares_model:
        yield open_alone(args, adapters, options)
        return
    ranks = open_ranks(*sizes, args.device)
    try:
        with _with_others(args, adapters, ranks, options, first_ends) as own:
            yield own
    finally:
        destroy_context(ranks.context)


def open_alone(args: argparse.Namespace, adapters: Mapping[str, Path], options: EngineOptions | OptionsOf) -> Opened:
    """The model of the flags, in this process alone.

    Raises:
        ValueError: files are wrong.
        OSError: a disk or a network fails, and may be back later.
    """
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    served = _load(args, Path(args.model), adapters, torch.device(name), None)
    return Opened(served, Engine(served, _options_for(served, options)))


@contextmanager
def _with_others(
    args: argparse.Namespace, adapters: Mapping[str, Path], ranks: Ranks, options: EngineOptions | OptionsOf,
    first_ends: bool,
) -> Iterator[Opened | None]:
    """This rank's part of the model, and on rank 0 the engine. Collective."""
    served = _load(args, Path(args.model), adapters, ranks.context.device, ranks)
    options = _options_for(served, options)
    parameter = next(served.model.parameters())
    own = num_blocks_of(served.model.config, options, parameter.dtype, parameter.device)
    # As many as the rank with the least memory can hold.
    count = min(ranks.context.gather(own))
    kind = InvariantRunner if options.batch_invariant else Runner
    runner = kind(served, count, options.block_size, parameter.dtype, parameter.device)
    lockstep = Lockstep(runner, ranks.of_first)
    if not ranks.context.is_main:
        # Not before: as long as the ranks meet and load, nobody has answers to finish.
        for number in (signal.SIGTERM, signal.SIGINT) if first_ends else (signal.SIGINT,):
            signal.signal(number, signal.SIG_IGN)
        lockstep.follow()
        yield None
        return
    try:
        engine = Engine(served, replace(options, cache_tokens=count * options.block_size), lockstep)
        yield Opened(served, engine, lockstep)
    finally:
        lockstep.end()


def _options_for(served: Served, options: EngineOptions | OptionsOf) -> EngineOptions:
    return options if isinstance(options, EngineOptions) else options(served.model)


def _load(
    args: argparse.Namespace, path: Path, adapters: Mapping[str, Path], device: torch.device, ranks: Ranks | None
) -> Served:
    dtype = resolve_dtype(args.dtype, device)
    new_cutter: Callable[[ModelConfig], Cutter] | None = None
    resolve = resolve_checkpoint_dir
    if ranks is not None:
        new_cutter = lambda shape: ranks.cutter(shape, dtype)  # noqa: E731
        resolve = ranks.resolve
    return load(path, adapters, device, dtype, args.load_in_4bit, new_cutter, resolve)

"""Stores: sets of ranks that see the same run directory.

If the nodes share a file system, there is one store with all ranks; otherwise each node is a store. Each store keeps
its own checkpoints: the files of its ranks, and the model, so that the weights are on every node. Ranks that hold the
same optimizer state divide the work among those of them in a store, so each store has all that one of its ranks holds:

    all ranks hold the same (DDP)                           each store has all
    each rank holds its own (ZeRO-1, FSDP)                  each store has its ranks' part
    each node's ranks share a copy of the model (HSDP)      each store has all, if it is a node
    ranks hold parts of it alike (tensor, pipe ...)         each store has its ranks' parts, once

A checkpoint is whole if the parts of one save (its `save_id`) together cover all ranks.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from runs.layout import SEEN_MARK
from utils.files import is_passing

Gather = Callable[[object], list]
"""Collective: every rank's JSON-like value, in rank order, on every rank."""


@dataclass(frozen=True)
class StorePlace:
    """A rank's place among the ranks that write a checkpoint."""

    rank: int
    world_size: int
    store: tuple[int, ...]
    """The ranks that share this one's file system, in order."""

    @property
    def is_first_of_store(self) -> bool:
        return self.rank == self.store[0]

    @property
    def shared_by_all(self) -> bool:
        return len(self.store) == self.world_size


def find_place(out_dir: Path, rank: int, world_size: int, gather: Gather) -> StorePlace:
    """Find out which ranks see the same `out_dir`: each leaves a file there for the others. Collective.

    Raises:
        ValueError: `out_dir` cannot be written; on all ranks.
        OSError: it cannot be written now (a full disk); on all ranks.
    """
    problem, mark = None, out_dir / f"{SEEN_MARK}{rank}-{secrets.token_hex(8)}"
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        problem = [f"--out_dir {out_dir} cannot be written: {error.strerror}", error.errno if is_passing(error) else 0]
    problems = gather(problem)
    names = gather(mark.name)
    # The next gather ends only when all have looked. (Path.exists would raise where the directory may not be searched.)
    seen = [r for r, name in enumerate(names) if r == rank or os.path.exists(out_dir / name)]
    gather(None)
    if problem is None:
        mark.unlink(missing_ok=True)
    for sentence, passing in filter(None, problems):
        raise OSError(passing, sentence) if passing else ValueError(sentence)
    return StorePlace(rank, world_size, tuple(seen))


@dataclass(frozen=True)
class Part:
    """A store's part of a saved checkpoint."""

    step: int
    valid_loss: float | None
    save_id: str
    world_size: int
    ranks: tuple[int, ...]
    """The ranks that wrote this part."""
    covers: tuple[int, ...]
    """The ranks whose optimizer state it holds: also those that hold the same as one that wrote."""


def missing_ranks(parts: Iterable[Part]) -> list[int]:
    """Ranks whose optimizer state is missing from the parts of one save; if empty, the save is whole."""
    parts = list(parts)
    if not parts:
        return [0]
    return sorted(set(range(parts[0].world_size)) - {rank for part in parts for rank in part.covers})


def enough_of(parts: Mapping[int, Part]) -> tuple[int, ...]:
    """First ranks of stores whose parts together hold all of a save that is whole; the others hold the same again.

    Args:
        parts: by the first rank of their store.
    """
    covered: set[int] = set()
    enough = []
    for rank, part in parts.items():
        if not covered.issuperset(part.covers):
            enough.append(rank)
            covered |= set(part.covers)
    return tuple(enough)

"""The files of the checkpoint that a run resumes from; each node may hold a part of them.

A node that lacks a file gets it from one that has it, in `ckpt/.fetched-step-N/`, which is deleted once everything is
loaded. If all ranks see one file system, nothing is asked and nothing is sent.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from checkpoint.choosing import Chosen
from checkpoint.folder import is_file_of_rank, is_hook_file, is_optimizer_file, optimizer_file, rank_of_hook_file
from checkpoint.stores import Gather, StorePlace

logger = logging.getLogger(__name__)


class CheckpointFiles:
    """The places of the files for this rank. All methods are collective.

    Args:
        send_file: (path, source rank, target rank): copy a file; called on all ranks, in one order.
    """

    def __init__(
        self,
        ckpt_dir: Path,
        chosen: Chosen,
        place: StorePlace,
        gather: Gather,
        send_file: Callable[[Path, int, int], None],
    ):
        self._own, self._fetched = ckpt_dir / chosen.name, ckpt_dir / f".fetched-{chosen.name}"
        self._chosen, self._place, self._gather, self._send_file = chosen, place, gather, send_file

    @property
    def directories(self) -> list[Path]:
        """Folders with files on this node: its own part, and the files that were brought."""
        if self._place.shared_by_all:
            return [self._own]
        holds = self._place.store[0] in self._chosen.holders
        return [self._own, self._fetched] if holds else [self._fetched]

    def bring_model(self) -> Path:
        """A folder with the model, its configuration, the tokenizer and the trainer's state."""
        if not self._place.shared_by_all:
            holds = self._place.store[0] in self._chosen.holders
            sources, first = self._sources(), min(self._chosen.holders)
            # Stores may have cut the model into other files.
            model = {name for name, source in sources.items() if source == first and not is_file_of_rank(name)}
            self._bring(set() if holds else model, sources)
        return self.directories[0]

    def bring_state(self, is_all_here: Callable[[list[Path]], bool], all_hooks: bool = False) -> None:
        """Bring the files that ranks wrote for themselves, as far as this rank needs them.

        Args:
            is_all_here: says whether folders hold the optimizer state of this rank.
            all_hooks: it needs the memory of all ranks' comm hooks, rather than that of its number.
        """
        if self._place.shared_by_all:
            return
        sources = self._sources()
        self._bring(set(filter(is_hook_file, sources) if all_hooks else self._hook_files(sources)), sources)
        if len(self._chosen.enough) > 1:
            # Where each rank wrote its own, one file is all that a rank of the same mesh lacks.
            own = optimizer_file(self._place.rank)
            self._bring({own} if own in sources and not is_all_here(self.directories) else set(), sources)
        state = {n for n, source in sources.items() if is_optimizer_file(n) and source in self._chosen.enough}
        self._bring(set() if is_all_here(self.directories) else state, sources)

    def hook_states(self) -> list[tuple[Path, bool]]:
        """Memories of comm hooks that this rank takes up: (file, whether its residuals are for this rank; if not, only
        the part that all ranks share counts)."""
        return [(self._here(name), self._is_mine(name)) for name in self._hook_files(self._sources())]

    def all_hook_states(self) -> dict[int, Path]:
        """Number of each rank that has saved the memory of its comm hook -> the file; see `bring_state`."""
        names = sorted(filter(is_hook_file, self._sources()), key=rank_of_hook_file)
        return {rank_of_hook_file(name): self._here(name) for name in names}

    def _here(self, name: str) -> Path:
        return next(directory / name for directory in self.directories if (directory / name).exists())

    def lost_hook_states(self) -> list[int]:
        """Ranks whose comm hooks had a memory that no node holds any more."""
        kept = {rank_of_hook_file(name) for name in self._sources() if is_hook_file(name)}
        return sorted(set(range(self._chosen.world_size)) - kept) if kept else []

    def _hook_files(self, names: dict[str, int]) -> list[str]:
        """Files of this rank's number, and of every world_size-th after it; the first file if there are none."""
        ordered = sorted(filter(is_hook_file, names), key=rank_of_hook_file)
        return list(filter(self._is_mine, ordered)) or ordered[:1]

    def _is_mine(self, name: str) -> bool:
        return rank_of_hook_file(name) % self._place.world_size == self._place.rank

    def _sources(self) -> dict[str, int]:
        """Name of each file of the checkpoint -> first rank that holds it in its own part."""
        holds = self._place.rank in self._chosen.holders
        found: dict[str, int] = {}
        for rank, names in enumerate(self._gather([path.name for path in self._own.iterdir()] if holds else [])):
            for name in names:
                found.setdefault(name, rank)
        return found

    def _bring(self, wanted: set[str], sources: dict[str, int]) -> None:
        lacking = sorted(name for name in wanted if not any((d / name).exists() for d in self.directories))
        by_rank, targets = self._gather(lacking), self._gather(self._place.store[0])
        asked = sorted({(name, targets[rank]) for rank, names in enumerate(by_rank) for name in names})
        for name, target in asked:
            source = sources[name]
            if self._place.rank == target:
                self._fetched.mkdir(exist_ok=True)
            self._send_file((self._own if self._place.rank == source else self._fetched) / name, source, target)
        if asked and self._place.rank == 0:
            logger.info("brought %d files of %s to nodes that lacked them", len(asked), self._chosen.name)
        # The other ranks of a node read what its first one received.
        self._gather(None)

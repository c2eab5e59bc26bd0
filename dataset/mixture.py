"""Several pretokenized directories as one stream with exact shares (shares.py).

    position n --schedule--> source, its i-th sample --order of this source--> sample id

Each source is read in the order that it has when it is trained on alone. So a run that began with one directory can go
on with a mixture, and one mixture with another: nothing is repeated, nothing lost.
"""

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset.format import BinHeader
from dataset.mixture_spec import MixtureSpec
from dataset.order import sample_at
from dataset.pretrain import PretrainDataset, as_tensors
from dataset.shares import Schedule, plan, require_rising, schedule_from_json, schedule_to_json

if TYPE_CHECKING:
    import torch


class MixtureDataset:
    """One set (train or valid) of several directories.

    A sample's id is its number in its source, plus the samples of the sources before.

    Args:
        parts: the set of each source.
    Raises:
        ValueError: they do not fit together.
    """

    def __init__(self, spec: MixtureSpec, parts: Sequence[PretrainDataset]):
        self.spec, self.parts = spec, list(parts)
        self.names = [source.name for source in spec.sources]
        self.max_seq_len, self.document_mask = parts[0].max_seq_len, parts[0].document_mask
        self._begins = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        self.fingerprint = hashlib.sha256(" ".join(["mixture", *self.fingerprints]).encode()).hexdigest()
        self.schedule: Schedule | None = None
        """Set by `arrange` or `take`."""
        self._wished: list[Any] = []
        self._own_order: np.ndarray | None = None
        first = parts[0].header
        for name, part in zip(self.names, parts):
            header = part.header
            if (header.vocab_size, header.eod_id, header.tokenizer_fingerprint) != (
                first.vocab_size, first.eod_id, first.tokenizer_fingerprint,
            ):  # fmt: skip
                raise ValueError(
                    f"{name} and {self.names[0]} were tokenized with different tokenizers: pretokenize all sources of "
                    f"a mixture with one"
                )
        twice = [name for name, mark in zip(self.names, self.fingerprints) if self.fingerprints.count(mark) > 1]
        if twice:
            raise ValueError(f"{' and '.join(twice)} hold the same data: name it once, with the sum of their shares")

    def __len__(self) -> int:
        return int(self._begins[-1])

    @property
    def fingerprints(self) -> list[str]:
        """Of each source."""
        return [part.fingerprint for part in self.parts]

    @property
    def header(self) -> BinHeader:
        """As PretrainDataset.header: what all files agree on."""
        return self.parts[0].header

    @property
    def valid_ratio(self) -> float:
        """The greatest of the sources': above 0 if any holds out something."""
        return max(part.valid_ratio for part in self.parts)

    def description(self) -> str:
        """Sentence on the samples, for people."""
        told = ", ".join(f"{name} {len(part):,}" for name, part in zip(self.names, self.parts))
        return f"{len(self):,} samples of {self.max_seq_len} tokens in {len(self.parts)} sources: {told}"

    def context_and_supervised_share(self) -> tuple[float, float]:
        return self.parts[0].context_and_supervised_share()

    def longest(self) -> int:
        return 0

    def check(self, tokenizer_fingerprint: str, valid_ratio: float | None = None) -> None:
        """As PretrainDataset.check, for each source."""
        for part in self.parts:
            part.check(tokenizer_fingerprint, valid_ratio)

    def check_content(self) -> None:
        """As PretrainDataset.check_content, for each source."""
        for part in self.parts:
            part.check_content()

    def arrange(self, total: int, position: int = 0, before: Mapping[str, Any] | None = None) -> None:
        """Fix the order of the samples.

        Args:
            total: samples of the whole run.
            position: the run goes on here.
            before: the stream that it goes on from, as a checkpoint holds it (training.data.order_of_samples); None:
                it begins.
        Raises:
            ValueError: shares are impossible, or the sources do not suffice.
        """
        wishes = self.spec.wishes(total)
        require_rising([begin for begin, _ in wishes])
        limits = [
            None if source.epochs is None else int(source.epochs * len(part))
            for source, part in zip(self.spec.sources, self.parts)
        ]
        self._wished = [[[begin, [str(share) for share in shares]] for begin, shares in wishes], limits]
        kept = _schedule_of(before)
        if before is not None and kept is not None and self._asks_the_same(before["mixture"]):
            self.schedule = kept
        else:
            given = given_before(before, position)
            done = [given.get(mark, 0) for mark in self.fingerprints]
            now = [wish for wish in wishes if wish[0] <= position][-1]
            later = [wish for wish in wishes if wish[0] > position]
            self.schedule = plan([(position, now[1]), *later], limits, done)
        if self.schedule.end is not None and self.schedule.end < total:
            raise ValueError(
                f"the mixture ends after {self.schedule.end:,} samples, as each source has been read as often as it "
                f"may (epochs), and the run needs {total:,}: allow more epochs, or train for fewer steps"
            )

    def take(self, state: Mapping[str, Any]) -> None:
        """Take the order that `state` recorded.

        Raises:
            ValueError: it is damaged.
        """
        self.schedule = _schedule_of({"mixture": state})

    def state(self) -> dict[str, Any]:
        """What decides the order, for records and checkpoints."""
        assert self.schedule is not None
        sources = [
            {"name": source.name, "dir": str(source.path), "fingerprint": part.fingerprint, "samples": len(part)}
            for source, part in zip(self.spec.sources, self.parts)
        ]
        return {"sources": sources, "wished": self._wished, "schedule": schedule_to_json(self.schedule)}

    def _asks_the_same(self, before: Mapping[str, Any]) -> bool:
        marks = [source["fingerprint"] for source in before["sources"]]
        return marks == self.fingerprints and before["wished"] == self._wished

    def ids_at(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """Ids of the samples at positions of the run's stream, int64; -1 behind the end, where loaders read ahead."""
        assert self.schedule is not None
        sources, indices = self.schedule.at(positions)
        ids = np.full_like(indices, -1)
        for source in range(len(self.parts)):
            mine = sources == source
            ids[mine] = self._begins[source] + sample_at(seed, indices[mine], len(self.parts[source]))
        return ids

    def in_own_order(self) -> "MixtureDataset":
        """The set with all samples, each once, for validation: sources alternate by their greatest shares, so that a
        beginning of it holds all of them. Samples are then numbered in this order."""
        shares = [max(phase[1][source] for phase in self.spec.phases) for source in range(len(self.parts))]
        shares = [share or Fraction(1, 100) for share in shares]
        sizes = [len(part) for part in self.parts]
        schedule = plan([(0, shares)], sizes, [0] * len(sizes))
        sources, indices = schedule.at(np.arange(len(self)))
        self._own_order = self._begins[sources] + indices
        return self

    def sources_of(self, sample_ids: np.ndarray) -> np.ndarray:
        """Number of each sample's source, int64."""
        ids = sample_ids if self._own_order is None else self._own_order[sample_ids]
        return np.searchsorted(self._begins, ids, side="right") - 1

    def read_rows(self, sample_ids: np.ndarray) -> np.ndarray:
        """As PretrainDataset.read_rows.

        Raises:
            ValueError: also if the mixture has ended.
        """
        if sample_ids.size and sample_ids.min() < 0:
            raise ValueError("the mixture has ended: each source has been read as often as it may (epochs)")
        ids = sample_ids if self._own_order is None else self._own_order[sample_ids]
        sources = self.sources_of(sample_ids)
        rows = np.empty((len(ids), self.max_seq_len + 1), np.int64)
        for source in np.unique(sources).tolist():
            mine = sources == source
            rows[mine] = self.parts[source].read_rows(ids[mine] - self._begins[source])
        return rows

    def input_rows(self, sample_ids: np.ndarray) -> np.ndarray:
        return self.read_rows(sample_ids)[:, :-1]

    def collate(self, sample_ids: np.ndarray) -> "dict[str, torch.Tensor]":
        """As PretrainDataset.collate; also sources (B,) int64, the number of each sample's."""
        batch = self.parts[0].batch_of(self.read_rows(sample_ids), sample_ids)
        return batch | as_tensors({"sources": self.sources_of(sample_ids)})


def _schedule_of(stream: Mapping[str, Any] | None) -> Schedule | None:
    """The schedule of a recorded stream; None: it is no mixture's."""
    if stream is None or "mixture" not in stream:
        return None
    try:
        return schedule_from_json(stream["mixture"]["schedule"])
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"the recorded mixture cannot be read ({error})") from None


def given_before(stream: Mapping[str, Any] | None, position: int) -> dict[str, int]:
    """Fingerprint of each source of a recorded stream -> samples that it gave before a position.

    Raises:
        ValueError: the record is damaged.
    """
    if stream is None:
        return {}
    schedule = _schedule_of(stream)
    if schedule is None:
        return {stream["data"]: position}
    marks = [source["fingerprint"] for source in stream["mixture"]["sources"]]
    return dict(zip(marks, schedule.counts(position), strict=True))

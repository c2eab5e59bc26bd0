"""What the next forward pass computes, and for whom. Plain data, without torch.

    waiting units --admit: blocks for all their tokens--> running units --end--> gone
          ^                                                     |
          +---------- preempted: blocks are needed -------------+

A unit is a sequence, or the beams of a search, which step together. Each step has a budget of tokens:

1. Sequences that lack one token get it (continuous batching: Yu et al., "Orca", OSDI 2022).
2. What is left goes to prompts, in order of arrival and in pieces (chunked prefill: Agrawal et al., "Sarathi-Serve",
   OSDI 2024), and then to units that are admitted, in order of arrival, too.

A unit is admitted with the blocks that its tokens need; later it needs a block now and then. If there is none, the unit
that came last gives up its blocks and waits, in its old place. What it has said is computed again. The oldest unit is
never preempted, and each fits into the cache alone, so everything ends. A unit whose next block is just being computed
by another waits for that block. A step runs sequences of one adapter; adapters take turns.

A unit for which there is no room holds up those that came after it, even if they are small. Room comes only from those
that run; if small ones could take it again and again, a large one would never see enough of it at once. So a unit waits
for those before it alone, and the places that stay empty meanwhile are what that costs.
"""

from bisect import insort
from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

from serving.cache import Blocks, Table, first_key, next_key
from serving.plan import Part, StepPlan


@dataclass(eq=False)
class Sequence:
    """A prompt and what follows it."""

    tokens: list[int]
    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""
    table: Table | None = None
    """Its blocks, while it runs."""
    keys: list[bytes] = field(default_factory=list)
    """Keys of its full blocks, as far as they are known; see cache.py."""
    num_announced: int = 0
    """Blocks, from its first, that others were told to wait for."""

    @property
    def num_left(self) -> int:
        return len(self.tokens) - self.num_computed


@dataclass(eq=False)
class Unit:
    """A sequence, or the beams of one search.

    Args:
        arrival: number of the request, and of the choice in it.
        limit: tokens that a sequence may have at most, those of the prompt included.
        width: sequences that it will be, as soon as the prompt is computed.
        adapter: whose.
        first_score: number of the first token of the prompt whose scores are wanted, with those of all after it; None:
            only the last one's are.
    """

    arrival: tuple[int, int]
    sequences: list[Sequence]
    limit: int
    width: int = 1
    adapter: str | None = None
    first_score: int | None = None
    is_search: bool = False
    """Whether its sequences are beams, and stay together."""
    num_cached: int = -1
    """Tokens of the prompt that were in the cache already; -1: it did not run yet."""
    prompt_length: int = 0
    """Tokens of the prompt."""
    group: int = 0
    """Units of different groups share no blocks, see model.rope.length_group."""

    @property
    def num_places(self) -> int:
        return max(self.width, len(self.sequences))

    @property
    def is_ready(self) -> bool:
        """Whether each of its sequences lacks one token, and no scores before that one's are wanted."""
        if self.first_score is not None:
            return False
        for sequence in self.sequences:
            if sequence.num_left != 1:
                return False
        return True


class Scored(NamedTuple):
    """Part of a plan, and whose it is."""

    unit: Unit
    sequence: Sequence
    part: Part

    @property
    def is_last(self) -> bool:
        """Whether the part ends with the sequence's last token, whose scores say what follows."""
        return self.part.start + len(self.part.tokens) == len(self.sequence.tokens)


class Planned(NamedTuple):
    """A step, with the owner of each part in the plan's order."""

    plan: StepPlan
    owners: list[Scored]


class Scheduler:
    """Units, and the blocks that they have.

    Args:
        max_running: sequences that run at once; each has a token in a step's budget.
        tokens_a_step: the budget.
        scores_a_step: tokens of prompts whose scores one step gives; each has scores for the whole vocabulary.
    """

    def __init__(self, blocks: Blocks, max_running: int, tokens_a_step: int, scores_a_step: int):
        assert 1 <= max_running <= tokens_a_step and scores_a_step >= 1
        self.blocks, self.max_running = blocks, max_running
        self.tokens_a_step, self.scores_a_step = tokens_a_step, scores_a_step
        self.waiting: list[Unit] = []
        self.running: list[Unit] = []
        self.num_preemptions = 0
        self._last_turns: dict[str | None, int] = {}
        self._num_turns = 0
        # How many running units will compute the block of a key.
        self._coming: Counter[bytes] = Counter()

    def fits(self, num_prompt: int, limit: int, width: int) -> bool:
        """Whether the cache has room for a unit if there is no other. Its last token need not be in the cache."""
        size = self.blocks.block_size
        shared = num_prompt // size if width > 1 else 0
        each = self.blocks.blocks_for(max(num_prompt, limit - 1))
        return shared + width * (each - shared) <= self.blocks.count

    def add(self, unit: Unit) -> None:
        """Let a unit wait for its turn."""
        self._last_turns.setdefault(unit.adapter, self._num_turns)
        insort(self.waiting, unit, key=lambda unit: unit.arrival)

    def end(self, unit: Unit) -> None:
        """Drop a unit, waiting or running; its blocks are free."""
        if unit in self.running:
            self._release(unit)
            self.running.remove(unit)
        elif unit in self.waiting:
            self.waiting.remove(unit)

    def plan(self) -> Planned | None:
        """The next step; None if there is nothing to do. Call `computed` once it has run."""
        if not self.running and not self.waiting:
            return None
        adapters, preemptions = set(self._last_turns), self.num_preemptions
        if len(adapters) > 1:
            adapters = {unit.adapter for unit in (*self.running, *self.waiting)}
        for adapter in sorted(adapters, key=lambda adapter: self._last_turns[adapter]):
            step = _Step(self, adapter)
            step.fill(is_full=self.num_preemptions > preemptions)
            if step.owners:
                self._num_turns += 1
                self._last_turns[adapter] = self._num_turns
                return Planned(StepPlan([owner.part for owner in step.owners], step.copies, adapter), step.owners)
        raise AssertionError("nobody can go on")

    def computed(self, planned: Planned) -> None:
        """Note that a step has run."""
        for unit, sequence, part in planned.owners:
            first = sequence.num_computed // self.blocks.block_size
            sequence.num_computed += len(part.tokens)
            filled = range(first, sequence.num_computed // self.blocks.block_size)
            if filled and self.blocks.shares_prefixes:
                assert sequence.table is not None
                keys = self._keys_of(unit, sequence)
                for index in filled:
                    self.blocks.know(sequence.table.blocks[index], keys[index])
                self._came(sequence, filled)
            if sequence.num_left == 0:
                unit.first_score = None

    def fork(self, unit: Unit, num_units: int) -> list[Unit]:
        """Further units with the same tokens and blocks as one whose prompt is computed. The next choices have their
        arrivals after it."""
        unit.width = 1
        (sequence,), (request, choice) = unit.sequences, unit.arrival
        new = [
            Unit((request, choice + number), [self._copy(sequence)], unit.limit, 1, unit.adapter, None,
                 unit.is_search, unit.num_cached, unit.prompt_length, unit.group)
            for number in range(1, num_units)
        ]  # fmt: skip
        self.running += new
        return new

    def select(self, unit: Unit, parents: Items[int], tokens: Items[int]) -> None:
        """Replace the sequences of a running unit by continuations of some of them: each parent with one token."""
        unit.width = 1
        old, unit.sequences, taken = unit.sequences, [], set()
        for parent in parents:
            # The first one goes on with its parent's run of blocks.
            unit.sequences.append(self._copy(old[parent]) if parent in taken else old[parent])
            taken.add(parent)
        for sequence, token in zip(unit.sequences, tokens, strict=True):
            sequence.tokens.append(token)
        for number, sequence in enumerate(old):
            if number not in taken:
                self._close(sequence)

    def preempt(self, unit: Unit) -> None:
        """Take a running unit's blocks away; it waits to be computed again."""
        self._release(unit)
        self.running.remove(unit)
        self.add(unit)
        self.num_preemptions += 1

    def _copy(self, sequence: Sequence) -> Sequence:
        assert sequence.table is not None
        table = self.blocks.fork(sequence.table)
        return Sequence(list(sequence.tokens), sequence.num_computed, table, list(sequence.keys))

    def _close(self, sequence: Sequence) -> None:
        assert sequence.table is not None
        self.blocks.close(sequence.table)
        sequence.table, sequence.num_computed = None, 0

    def _release(self, unit: Unit) -> None:
        for sequence in unit.sequences:
            self._came(sequence, range(sequence.num_computed // self.blocks.block_size, sequence.num_announced))
            sequence.num_announced = 0
            self._close(sequence)

    def _keys_of(self, unit: Unit, sequence: Sequence) -> list[bytes]:
        """Keys of all full blocks of a sequence's tokens."""
        size, keys = self.blocks.block_size, sequence.keys
        for start in range(len(keys) * size, len(sequence.tokens) - size + 1, size):
            before = keys[-1] if keys else first_key(unit.adapter, unit.group)
            keys.append(next_key(before, sequence.tokens[start : start + size]))
        return keys

    def _announce(self, unit: Unit, sequence: Sequence) -> None:
        """Let others wait for the blocks that a sequence is going to compute."""
        if self.blocks.shares_prefixes:
            keys = self._keys_of(unit, sequence)
            sequence.num_announced = len(keys)
            self._coming.update(keys[sequence.num_computed // self.blocks.block_size :])

    def _came(self, sequence: Sequence, indices: range) -> None:
        for index in indices:
            if index < sequence.num_announced:
                key = sequence.keys[index]
                self._coming[key] -= 1
                if not self._coming[key]:
                    del self._coming[key]


class _Entry(NamedTuple):
    """How a sequence begins to run."""

    shared: list[int]
    """Known blocks."""
    leader: int
    """Number of the beam whose first blocks it has, instead of known ones; -1: none."""
    num_shared: int


class _Step:
    """A step that is being planned for one adapter."""

    def __init__(self, scheduler: Scheduler, adapter: str | None):
        self.scheduler, self.adapter, self.blocks = scheduler, adapter, scheduler.blocks
        self.tokens_left, self.scores_left = scheduler.tokens_a_step, scheduler.scores_a_step
        self.owners: list[Scored] = []
        self.copies: list[tuple[int, int]] = []

    def fill(self, is_full: bool) -> None:
        """Add what can be computed.

        Args:
            is_full: somebody had to give up blocks just now, so nobody is admitted.
        """
        preemptions = self.scheduler.num_preemptions
        running = sorted((unit for unit in self.scheduler.running if unit.adapter == self.adapter),
                         key=lambda unit: unit.arrival)  # fmt: skip
        going_on = [unit for unit in running if unit.is_ready]
        beginning = [unit for unit in running if not unit.is_ready]
        for unit in going_on:
            # An older one may have taken its blocks.
            if unit in self.scheduler.running and self._make_room(unit):
                self._add_next(unit)
        for unit in beginning:
            if unit in self.scheduler.running:
                self._add_prompt(unit)
        if not is_full and self.scheduler.num_preemptions == preemptions:
            self._admit()

    def _make_room(self, unit: Unit) -> bool:
        """Whether a unit has the blocks for its next tokens, after others were preempted if need be."""
        while self._num_new_blocks(unit) > self.blocks.num_free:
            last = max(self.scheduler.running, key=lambda unit: unit.arrival)
            self.scheduler.preempt(last)
            if last is unit:
                return False
        return True

    def _num_new_blocks(self, unit: Unit) -> int:
        """Number of free blocks that a unit's next tokens take."""
        if len(unit.sequences) == 1:
            (sequence,), size = unit.sequences, self.blocks.block_size
            assert sequence.table is not None
            blocks = sequence.table.blocks
            return int(len(blocks) * size < len(sequence.tokens) or self.blocks.users[blocks[-1]] > 1)
        count, writers = 0, Counter[int]()
        for sequence in unit.sequences:
            assert sequence.table is not None
            if len(sequence.table.blocks) * self.blocks.block_size < len(sequence.tokens):
                count += 1
            else:
                writers[sequence.table.blocks[-1]] += 1
        for block, number in writers.items():
            # The last user writes into the block itself.
            count += number - (self.blocks.users[block] == number)
        return count

    def _add_next(self, unit: Unit) -> None:
        """Add the one token that each sequence of a unit lacks."""
        for sequence in unit.sequences:
            table = sequence.table
            assert table is not None
            expected = self.blocks.blocks_for(unit.limit) - len(table.blocks)
            if len(table.blocks) * self.blocks.block_size < len(sequence.tokens):
                self.blocks.grow(table, 1, expected)
            elif (copy := self.blocks.make_own(table, expected + 1)) is not None:
                self.copies.append(copy)
            self._add(unit, sequence, 1)

    def _add_prompt(self, unit: Unit) -> None:
        """Add as many tokens of a unit as there is room for. Beams follow each other, as they may share blocks; they
        keep their last token back, so that they get their scores in one step."""
        kept_back = int(len(unit.sequences) > 1)
        for sequence in unit.sequences:
            count = min(sequence.num_left - kept_back, self.tokens_left)
            if unit.first_score is not None:
                count = min(count, max(0, unit.first_score - sequence.num_computed) + self.scores_left)
            if count:
                self._add(unit, sequence, count)
            if count or sequence.num_left > kept_back:
                return

    def _add(self, unit: Unit, sequence: Sequence, count: int) -> None:
        assert sequence.table is not None
        start, end = sequence.num_computed, sequence.num_computed + count
        num_scores = int(end == len(sequence.tokens))
        if unit.first_score is not None:
            num_scores = max(0, end - max(start, unit.first_score))
            self.scores_left -= num_scores
        self.tokens_left -= count
        blocks = sequence.table.blocks[: self.blocks.blocks_for(end)]
        part = Part(sequence.tokens[start:end], start, blocks, num_scores, unit.prompt_length)
        self.owners.append(Scored(unit, sequence, part))

    def _admit(self) -> None:
        """Let waiting units run, in the order of their arrival. Older ones of other adapters, whose turn it is not,
        keep the room that they need."""
        scheduler = self.scheduler
        places = scheduler.max_running - sum(unit.num_places for unit in scheduler.running)
        kept_blocks = 0
        for unit in list(scheduler.waiting):
            if self.tokens_left <= 0 or unit.num_places > places:
                break
            entries, needed = self._entries(unit)
            places -= unit.num_places
            if self._waits_for_others(unit, entries):
                continue
            # Those who run may each need a block soon.
            spare = sum(len(unit.sequences) for unit in scheduler.running)
            if needed + kept_blocks + spare > self.blocks.num_free:
                break
            if unit.adapter != self.adapter:
                kept_blocks += needed
                continue
            self._start(unit, entries)
            if unit.is_ready:
                if self.tokens_left >= len(unit.sequences):
                    self._add_next(unit)
            else:
                self._add_prompt(unit)

    def _entries(self, unit: Unit) -> tuple[list[_Entry], int]:
        """How each sequence of a unit would begin, and the number of free blocks that this takes."""
        entries, needed, found = [], 0, set()
        size = self.blocks.block_size
        for number, sequence in enumerate(unit.sequences):
            most = self._most_shared(unit, sequence)
            shared: list[int] = []
            if self.blocks.shares_prefixes and most:
                shared = self.blocks.find(self.scheduler._keys_of(unit, sequence)[:most])
            leader, length = -1, len(shared)
            for other in range(number):
                common = min(_num_common(sequence.tokens, unit.sequences[other].tokens) // size, most)
                if common > length:
                    leader, length = other, common
            if leader < 0:
                found |= {block for block in shared if not self.blocks.users[block]}
            needed += self.blocks.blocks_for(len(sequence.tokens)) - length
            entries.append(_Entry(shared, leader, length))
        return entries, needed + len(found)

    def _most_shared(self, unit: Unit, sequence: Sequence) -> int:
        """Number of blocks that need not be computed if they are known: those before the first token whose scores are
        wanted."""
        last = len(sequence.tokens) - 1
        return (last if unit.first_score is None else unit.first_score) // self.blocks.block_size

    def _waits_for_others(self, unit: Unit, entries: list[_Entry]) -> bool:
        """Whether the block after those that a unit finds is just being computed."""
        sequence, length = unit.sequences[0], entries[0].num_shared
        if length >= self._most_shared(unit, sequence):
            return False
        return bool(self.blocks.shares_prefixes and sequence.keys[length] in self.scheduler._coming)

    def _start(self, unit: Unit, entries: list[_Entry]) -> None:
        scheduler = self.scheduler
        scheduler.waiting.remove(unit)
        scheduler.running.append(unit)
        # All blocks that are known must be in use before the first new one is taken, or it could be one of them.
        for sequence, entry in zip(unit.sequences, entries):
            if entry.leader < 0:
                sequence.table = self.blocks.open(entry.shared)
        for sequence, entry in zip(unit.sequences, entries):
            if entry.leader >= 0:
                leader = unit.sequences[entry.leader].table
                assert leader is not None
                sequence.table = self.blocks.open(leader.blocks[: entry.num_shared])
            assert sequence.table is not None
            sequence.num_computed = entry.num_shared * self.blocks.block_size
            missing = self.blocks.blocks_for(len(sequence.tokens)) - entry.num_shared
            self.blocks.grow(sequence.table, missing, self.blocks.blocks_for(unit.limit) - entry.num_shared)
            scheduler._announce(unit, sequence)
        if unit.num_cached < 0:
            unit.num_cached = unit.sequences[0].num_computed


def _num_common(one: list[int], other: list[int]) -> int:
    """Number of first tokens that two sequences share."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))

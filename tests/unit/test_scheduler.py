"""The scheduler: random requests, cancellations, forks and beams in caches that are far too small. A model's cache is a
list of tokens here, so that each step can be checked against what it must have been able to read."""

import random
from dataclasses import dataclass, field

import pytest

from serving.cache import Blocks
from serving.scheduler import Planned, Scheduler, Sequence, Unit


@dataclass
class Pool:
    """Tokens, and whose adapter computed them, where a model would have their keys and values."""

    blocks: Blocks
    slots: list[tuple[str | None, tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = [(None, ())] * (self.blocks.count * self.blocks.block_size)

    def run(self, planned: Planned) -> None:
        size, slots = self.blocks.block_size, self.slots
        plan, written = planned.plan, set()
        old = list(slots)
        for source, target in plan.copies:
            slots[target * size : (target + 1) * size] = old[source * size : (source + 1) * size]
        assert len({target for _, target in plan.copies}) == len(plan.copies)
        readable = list(slots)
        for (unit, sequence, _), part in zip(planned.owners, plan.parts, strict=True):
            assert part.start == sequence.num_computed and part.tokens
            end = part.start + len(part.tokens)
            assert sequence.tokens[part.start : end] == part.tokens and unit.adapter == plan.adapter
            assert part.blocks == sequence.table.blocks[: len(part.blocks)]
            assert len(part.blocks) == self.blocks.blocks_for(end)
            places = [part.blocks[n // size] * size + n % size for n in range(end)]
            # A slot stands for all that its keys and values depend on: the tokens up to it. Parts do not wait for each
            # other, so what this step writes cannot be read in it.
            for n in range(part.start):
                assert readable[places[n]] == (plan.adapter, tuple(sequence.tokens[: n + 1])), "read what is not there"
            for n in range(part.start, end):
                # Beams that are computed again may have to share what the first of them writes.
                same = [one for one in unit.sequences if one.tokens[: n + 1] == sequence.tokens[: n + 1]]
                block = part.blocks[n // size]
                having = sum(block in one.table.blocks for one in same)
                assert self.blocks.users[block] == having and (having == 1 or end < len(sequence.tokens)), "wrote twice"
                assert self.blocks.key_of(block) is None
                assert places[n] not in written
                written.add(places[n])
            for n in range(part.start, end):
                slots[places[n]] = (plan.adapter, tuple(sequence.tokens[: n + 1]))


class World:
    """Requests that come, go on, fork, branch and end at random."""

    def __init__(self, seed: int, **sizes):
        self.random = random.Random(seed)
        draw = self.random.randint
        self.size = draw(1, 5)
        self.blocks = Blocks(sizes.get("count", draw(4, 16)), self.size, sizes.get("shares", bool(draw(0, 4))))
        self.max_running = draw(1, 6)
        self.scheduler = Scheduler(
            self.blocks, self.max_running, draw(self.max_running, 3 * self.max_running + 8), draw(1, 5)
        )
        self.pool, self.alive, self.arrived, self.ended = Pool(self.blocks), [], 0, 0
        self.waited: dict[Unit, int] = {}

    def submit(self) -> None:
        draw = self.random.randint
        width = draw(1, self.max_running) if not draw(0, 2) else 1
        prompt = [draw(0, 1) for _ in range(draw(1, 4 * self.size))]
        if draw(0, 1):
            prompt = [0] * (2 * self.size) + prompt
        limit, is_search = len(prompt) + draw(0, 3 * self.size), bool(draw(0, 1)) and width > 1
        if self.scheduler.fits(len(prompt), limit, width if is_search else 1):
            unit = Unit((self.arrived, 0), [Sequence(prompt)], limit, width, self.random.choice([None, "a", "b"]),
                        None if draw(0, 4) else draw(0, len(prompt) - 1), is_search)  # fmt: skip
            self.arrived += 1
            self.alive.append(unit)
            self.scheduler.add(unit)

    def cancel(self) -> None:
        if self.alive:
            self.end(self.random.choice(self.alive))

    def end(self, unit: Unit) -> None:
        self.alive.remove(unit)
        self.scheduler.end(unit)
        self.ended += 1

    def step(self) -> bool:
        before, preemptions = list(self.scheduler.running), self.scheduler.num_preemptions
        ready = [unit for unit in before if unit.is_ready]
        planned = self.scheduler.plan()
        if planned is None:
            return False
        preempted = [unit for unit in before if unit in self.scheduler.waiting]
        if preempted:
            first = min(unit.arrival for unit in preempted)
            assert all(unit.arrival < first for unit in self.scheduler.running), "the latest gives up its blocks"
        if self.scheduler.num_preemptions > preemptions:
            assert set(self.scheduler.running) < set(before), "nobody is admitted where another has just given way"
        has_part = {owner.unit for owner in planned.owners}
        for unit in ready:
            is_others_turn = unit.adapter != planned.plan.adapter
            assert unit in has_part or is_others_turn or unit in preempted, "who writes goes first"
        parts = planned.plan.parts
        assert sum(len(part.tokens) for part in parts) <= self.scheduler.tokens_a_step
        assert sum(unit.num_places for unit in self.scheduler.running) <= self.max_running
        for unit, _, part in planned.owners:
            if unit.first_score is not None:
                end = part.start + len(part.tokens)
                assert part.num_scores == len(range(max(part.start, unit.first_score), end))
        wanted = [part.num_scores for unit, _, part in planned.owners if unit.first_score is not None]
        assert sum(wanted) <= self.scheduler.scores_a_step
        self.check_tables()
        self.pool.run(planned)
        done: dict[Unit, int] = {}
        for owner in planned.owners:
            if owner.is_last:
                assert owner.part.num_scores
                done[owner.unit] = done.get(owner.unit, 0) + 1
        self.scheduler.computed(planned)
        for unit, number in done.items():
            assert number == len(unit.sequences), "beams step together"
            self.go_on(unit)
        self.check_tables()
        return True

    def go_on(self, unit: Unit) -> None:
        draw = self.random.randint
        if len(unit.sequences[0].tokens) >= unit.limit:
            self.end(unit)
        elif unit.is_search:
            count = unit.num_places
            parents = [draw(0, len(unit.sequences) - 1) for _ in range(count)]
            # Beams of one parent are different texts.
            tokens = [2 + number for number in range(count)]
            self.scheduler.select(unit, parents, tokens)
            if len(unit.sequences[0].tokens) == unit.limit or not draw(0, 9):
                self.end(unit)
        else:
            units = [unit, *self.scheduler.fork(unit, unit.width)]
            self.alive += units[1:]
            for one in units:
                one.sequences[0].tokens.append(draw(0, 1))
                if len(one.sequences[0].tokens) == one.limit or not draw(0, 9):
                    self.end(one)

    def check_tables(self) -> None:
        users = [0] * self.blocks.count
        for unit in self.scheduler.running:
            for sequence in unit.sequences:
                assert len(set(sequence.table.blocks)) == len(sequence.table.blocks)
                for block in sequence.table.blocks:
                    users[block] += 1
        assert users == self.blocks.users
        assert self.blocks.num_used == sum(count > 0 for count in users)
        for unit in self.scheduler.waiting:
            assert all(sequence.table is None and not sequence.num_computed for sequence in unit.sequences)
        assert set(self.alive) == {*self.scheduler.running, *self.scheduler.waiting}

    def finish(self) -> None:
        for _ in range(5000):
            if not self.step():
                break
        assert not self.alive and not self.blocks.num_used and not self.scheduler._coming


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_lives(first: int):
    preemptions = ended = 0
    for seed in range(first, first + 20):
        world = World(seed)
        for _ in range(60):
            for _ in range(world.random.choice([0, 0, 1, 2])):
                world.submit()
            if not world.random.randint(0, 12):
                world.cancel()
            world.step()
        world.finish()
        preemptions += world.scheduler.num_preemptions
        ended += world.ended
    assert preemptions > 20 and ended > 400


def unit_of(number: int, prompt: list[int], most: int, adapter: str | None = None) -> Unit:
    return Unit((number, 0), [Sequence(prompt)], len(prompt) + most, adapter=adapter)


def advance(scheduler: Scheduler) -> Planned:
    """A step, after which each text has a token more, or has ended."""
    planned = scheduler.plan()
    assert planned is not None
    lasts = [owner for owner in planned.owners if owner.is_last]
    scheduler.computed(planned)
    for unit, sequence, _ in lasts:
        sequence.tokens.append(1)
        if len(sequence.tokens) == unit.limit:
            scheduler.end(unit)
    return planned


def test_a_flood_of_short_requests_stops_nobody():
    """A long one, one with a large prompt, one of another adapter, and each of the flood get their answers, about as
    soon as if all came in order."""
    draw, scheduler = random.Random(0), Scheduler(Blocks(40, 4), 8, 16, 4)
    special = {10: unit_of(10, [5] * 8, 140), 50: unit_of(50, [6] * 150, 3), 90: unit_of(90, [7] * 9, 30, "other")}
    arrived, ended_at = {}, {}
    for step in range(700):
        if step < 400 and (step in special or draw.random() < 0.2):
            unit = special.get(step) or unit_of(step, [draw.randint(0, 9) for _ in range(8)], 24)
            arrived[unit] = step
            scheduler.add(unit)
        if scheduler.running or scheduler.waiting:
            advance(scheduler)
        for unit in arrived:
            if unit not in ended_at and unit not in scheduler.running and unit not in scheduler.waiting:
                ended_at[unit] = step
    assert ended_at.keys() == arrived.keys()
    waits = {unit: ended_at[unit] - arrived[unit] for unit in arrived}
    assert max(waits.values()) < 260 and scheduler.num_preemptions, (max(waits.values()), scheduler.num_preemptions)


def test_a_long_prompt_does_not_hold_up_those_who_write():
    scheduler = Scheduler(Blocks(100, 4), 4, 8, 8)
    for number in range(3):
        scheduler.add(unit_of(number, [number], 60))
    advance(scheduler)
    scheduler.add(unit_of(3, [9] * 100, 1))
    for _ in range(20):
        parts = advance(scheduler).plan.parts
        assert [len(part.tokens) for part in parts] == [1, 1, 1, 5]
    assert scheduler.running[-1].arrival == (2, 0)


def test_blocks_that_are_being_computed_are_waited_for():
    """Also if who computes them goes away."""
    scheduler = Scheduler(Blocks(100, 4), 8, 10, 8)
    begin = list(range(24))
    units = [unit_of(number, [*begin, number], 2) for number in range(3)]
    for unit in units:
        scheduler.add(unit)
    scheduler.add(unit_of(3, [50, 51], 5))
    plans = [advance(scheduler).plan for _ in range(2)]
    assert [[len(part.tokens) for part in plan.parts] for plan in plans] == [[10], [10]]
    scheduler.end(units[0])
    # The next one goes on where the first has stopped: 5 of 6 blocks are there.
    plan = advance(scheduler).plan
    assert [(part.start, len(part.tokens)) for part in plan.parts] == [(20, 5), (0, 2)]
    plan = advance(scheduler).plan
    assert [(part.start, len(part.tokens)) for part in plan.parts] == [(25, 1), (2, 1), (24, 1)]
    while scheduler.running:
        advance(scheduler)
    assert not scheduler._coming and not scheduler.blocks.num_used


def test_an_older_request_of_another_adapter_keeps_its_room():
    """Or those who come later, of the adapter whose turn it is, could take it again and again."""
    scheduler = Scheduler(Blocks(10, 4), 8, 64, 8)
    scheduler.add(unit_of(0, [0] * 15, 20, "ours"))
    advance(scheduler)
    older, newer = unit_of(1, [1] * 20, 1, "other"), unit_of(2, [2] * 8, 1, "ours")
    for unit in (older, newer):
        scheduler.add(unit)
    scheduler._last_turns |= {"ours": -1}
    planned = advance(scheduler)
    assert planned.plan.adapter == "ours" and scheduler.waiting == [older, newer]
    assert advance(scheduler).plan.adapter == "other" and older not in scheduler.waiting


def test_beams_are_computed_again_one_after_another():
    """The second one's first block is the first one's, so it begins when that one has been computed; both have their
    last token in one step."""
    scheduler = Scheduler(Blocks(20, 4, False), 4, 6, 8)
    search = Unit((0, 0), [Sequence([1] * 4)], 40, 2, is_search=True)
    scheduler.add(search)
    advance_search(scheduler, search, [0, 0], [5, 6])
    for token in range(7, 12):
        advance_search(scheduler, search, [0, 1], [token, token])
    scheduler.preempt(search)
    tokens = [list(one.tokens) for one in search.sequences]
    steps = []
    while not steps or len(steps[-1]) < 2:
        planned = scheduler.plan()
        steps.append([(search.sequences.index(owner.sequence), owner.part.start, len(owner.part.tokens))
                      for owner in planned.owners])  # fmt: skip
        scheduler.computed(planned)
    assert [one.tokens for one in search.sequences] == tokens and len(tokens[0]) == 10
    assert steps == [[(0, 0, 6)], [(0, 6, 3)], [(1, 4, 5)], [(0, 9, 1), (1, 9, 1)]]


def advance_search(scheduler: Scheduler, search: Unit, parents: list[int], tokens: list[int]) -> None:
    planned = scheduler.plan()
    assert {owner.unit for owner in planned.owners} == {search}
    scheduler.computed(planned)
    scheduler.select(search, parents, tokens)


def test_what_fits():
    """Beams share the full blocks of their prompt; the last token of each need not be in the cache."""
    scheduler = Scheduler(Blocks(10, 4), 8, 8, 8)
    assert scheduler.fits(40, 41, 1) and not scheduler.fits(40, 42, 1) and not scheduler.fits(41, 41, 1)
    assert scheduler.fits(9, 17, 3) and not scheduler.fits(9, 18, 3)
    assert scheduler.fits(7, 17, 3) and not scheduler.fits(3, 17, 3)

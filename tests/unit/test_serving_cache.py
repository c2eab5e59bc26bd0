"""Blocks of the cache: against plain dictionaries under random use, and which blocks are chosen."""

import random
from collections import Counter

import pytest

from serving.cache import Blocks, Table, first_key, next_key


def keys_of(tokens: list[int], size: int, adapter: str | None = None) -> list[bytes]:
    keys, key = [], first_key(adapter)
    for start in range(0, len(tokens) - size + 1, size):
        key = next_key(key, tokens[start : start + size])
        keys.append(key)
    return keys


def test_keys_tell_all_that_the_contents_depend_on():
    """Tokens, those before them, where blocks begin, and the adapter, whatever its name."""
    chains = {
        (adapter, tokens, size): tuple(keys_of(list(tokens), size, adapter))
        for adapter in (None, "", "a", "=", "=a") for tokens in ((1, 2, 3, 4), (1, 2, 3, 5), (2, 1, 3, 4))
        for size in (1, 2)
    }  # fmt: skip
    lasts = [chain[-1] for chain in chains.values()]
    assert len(set(lasts)) == len(lasts)
    assert chains["a", (1, 2, 3, 4), 2][0] == chains["a", (1, 2, 3, 5), 2][0]
    assert keys_of([2**40, 1], 1)[0] != keys_of([0, 1], 1)[0]


def used(blocks: Blocks) -> list[int]:
    return [block for block, users in enumerate(blocks.users) if users]


@pytest.mark.parametrize("seed", range(20))
def test_random_use(seed: int):
    draw = random.Random(seed)
    blocks, tables = Blocks(draw.randint(1, 24), 1, draw.random() < 0.8), dict[Table, list[bytes]]()
    known: dict[bytes, int] = {}
    for _ in range(400):
        table = draw.choice(list(tables)) if tables else None
        what = draw.choice(["open", "grow", "grow", "fork", "own", "close", "know"])
        if what == "open":
            chain = keys_of([draw.randint(0, 1) for _ in range(5)], 1)
            shared = blocks.find(chain)
            assert shared == [known[key] for key in chain[: len(shared)]]
            assert len(shared) == len(chain) or chain[len(shared)] not in known
            tables[blocks.open(shared)] = chain[: len(shared)]
        elif what == "grow" and table is not None:
            count = draw.randint(0, blocks.num_free)
            before = used(blocks), list(table.blocks)
            blocks.grow(table, count, draw.randint(0, 30))
            new = table.blocks[len(before[1]) :]
            assert len(set(new)) == count and not set(new) & set(before[0])
            assert table.blocks[: len(before[1])] == before[1]
            assert all(blocks.key_of(block) is None for block in new)
            known = {key: block for key, block in known.items() if block not in new}
            for _ in range(count):
                last = tables[table][-1] if tables[table] else first_key(None)
                tables[table].append(next_key(last, [draw.randint(0, 1)]))
        elif what == "fork" and table is not None:
            tables[blocks.fork(table)] = list(tables[table])
        elif what == "own" and table is not None and table.blocks and blocks.num_free:
            last, others = table.blocks[-1], blocks.users[table.blocks[-1]] - 1
            copy = blocks.make_own(table, draw.randint(1, 5))
            assert copy == ((last, table.blocks[-1]) if others else None) and blocks.users[table.blocks[-1]] == 1
            assert blocks.users[last] == max(others, 1)
            if others:
                known = {key: block for key, block in known.items() if block != table.blocks[-1]}
        elif what == "close" and table is not None:
            blocks.close(table)
            assert not table.blocks and not table.room
            del tables[table]
        elif what == "know" and table is not None and table.blocks:
            place = draw.randrange(len(table.blocks))
            block, key = table.blocks[place], tables[table][place]
            blocks.know(block, key)
            if blocks.shares_prefixes and key not in known and block not in known.values():
                known[key] = block
        users = Counter(block for table in tables for block in table.blocks)
        assert blocks.users == [users[block] for block in range(blocks.count)]
        assert blocks.num_free == blocks.count - len(users) and blocks.num_used == len(users)
        assert blocks._known == known
    for table in list(tables):
        blocks.close(table)
    assert blocks.num_used == 0 and not blocks._avoided_for.any()


def fill(blocks: Blocks, table: Table, name: int) -> list[bytes]:
    keys = keys_of([name] * len(table.blocks), 1)
    for block, key in zip(table.blocks, keys):
        blocks.know(block, key)
    return keys


def test_the_oldest_unused_prefix_is_evicted_first_and_from_its_end():
    blocks = Blocks(12, 1)
    tables = [blocks.open() for _ in range(3)]
    for table in tables:
        blocks.grow(table, 4, 4)
    keys = [fill(blocks, table, number) for number, table in enumerate(tables)]
    for number in (1, 0, 2):
        blocks.close(tables[number])
    # Found again, it counts as new.
    blocks.close(blocks.open(blocks.find(keys[1])))
    left = []
    for _ in range(6):
        blocks.grow(blocks.open(), 1, 1)
        left.append([len(blocks.find(chain)) for chain in keys])
    assert left == [[3, 4, 4], [2, 4, 4], [1, 4, 4], [0, 4, 4], [0, 4, 3], [0, 4, 2]]


def is_one_run(table: Table) -> bool:
    return table.blocks == list(range(table.blocks[0], table.blocks[0] + len(table.blocks)))


def test_sequences_that_grow_by_turns_lie_in_one_run_each():
    blocks, tables = Blocks(100, 16), []
    for _ in range(5):
        tables.append(blocks.open())
        blocks.grow(tables[-1], 3, 20)
    for _ in range(17):
        for table in tables:
            blocks.grow(table, 1, 20)
    assert all(is_one_run(table) for table in tables) and not blocks.num_free


def test_runs_come_back_when_everything_was_used_once():
    """Full blocks of texts that have ended are evicted run by run."""
    draw, blocks, alive, count, whole = random.Random(0), Blocks(400, 16), [], 0, 0
    for number in range(400):
        table, length = blocks.open(), draw.randint(5, 20)
        blocks.grow(table, draw.randint(1, 4), length)
        alive.append((table, length))
        while len(alive) > 8:
            growing, its_length = draw.choice(alive)
            if len(growing.blocks) < its_length:
                blocks.grow(growing, 1, its_length - len(growing.blocks))
            else:
                count, whole = count + 1, whole + is_one_run(growing)
                fill(blocks, growing, number)
                blocks.close(growing)
                alive.remove((growing, its_length))
    assert count > 350 and whole == count


def test_room_that_is_kept_is_given_up_at_need_from_its_end():
    blocks = Blocks(10, 16)
    first, second = blocks.open(), blocks.open()
    blocks.grow(first, 2, 10)
    assert first.blocks == [0, 1]
    blocks.grow(second, 3, 8)
    assert second.blocks == [7, 8, 9]
    blocks.grow(first, 5, 8)
    assert first.blocks == list(range(7)) and not blocks.num_free
    blocks.close(second)
    blocks.grow(first, 3, 3)
    assert is_one_run(first)

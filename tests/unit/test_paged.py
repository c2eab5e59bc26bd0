"""Paged caches: whatever the schedule and the places in the pool, scores are those of whole texts without a cache."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from model import Decoder, KVCache, ModelConfig, hf
from model.families import FAMILIES, family_of
from model.ops import build_ops
from model.paged import PagedCache, PagedStep, Segment
from model.rope import length_group
from tests.golden.make_families import CONFIGS
from tests.unit.test_family_models import SHAPE, VARIANTS
from tests.unit.test_family_numbers import FOLDERS

CPU, SIZE = torch.device("cpu"), 4
LENGTHS = (16, 3, 11, 8, 1)


def variants() -> dict[str, dict]:
    """Folders' configurations of all families."""
    of_transformers = {name: CONFIG_MAPPING[name.split()[0]](**SHAPE | VARIANTS[name]).to_dict() for name in VARIANTS}
    return of_transformers | FOLDERS | CONFIGS


KINDS = variants()


def new_model(config: ModelConfig) -> Decoder:
    model = Decoder(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # No term, bias or norm is one that changes nothing.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    return model


def model_of(values: dict, folder: Path) -> Decoder:
    (folder / "config.json").write_text(json.dumps(values))
    return new_model(hf.read_config(folder))


def small(**options) -> Decoder:
    config = {
        "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.2,
    } | options  # fmt: skip
    return new_model(ModelConfig(**config).resolve(32, 32))


def use(model: Decoder, names: dict[str, str]) -> None:
    """Let a model use these implementations."""
    model.ops = build_ops(dict(model.ops.names) | names)
    for block in model.layers:
        block.self_attn.ops = model.ops


def texts_of(model: Decoder, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = random.Random(5)
    context = model.config.max_position_embeddings
    # Dynamic scaling turns the beginning of a longer text otherwise, once the end is known.
    longest = context if model.config.rope_scaling == "dynamic" else 10**6
    return [[generator.randrange(model.config.vocab_size) for _ in range(min(n, longest))] for n in lengths]


def in_order(count: int, seed: int) -> Iterator[int]:
    return iter(range(count))


def scattered(count: int, seed: int) -> Iterator[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return iter(order)


def schedule(texts: list[list[int]], seed: int, longest: int = 6) -> Iterator[list[tuple[int, int, int]]]:
    """Steps: (text, number of its tokens before, number of new ones) of some texts in any order."""
    generator, done = random.Random(seed), [0] * len(texts)
    while any(begun < len(text) for begun, text in zip(done, texts)):
        left = [number for number, text in enumerate(texts) if done[number] < len(text)]
        step = []
        for number in generator.sample(left, generator.randint(1, len(left))):
            new = min(generator.choice((1, 1, generator.randint(1, longest))), len(texts[number]) - done[number])
            step.append((number, done[number], new))
            done[number] += new
        yield step


def run(
    model: Decoder, texts: list[list[int]], seed: int, places: Callable[[int, int], Iterator[int]], size: int = SIZE
) -> list[Tensor]:
    """Scores (T, V) of each text, computed piece by piece."""
    count = sum(-(-len(text) // size) for text in texts)
    parameter = next(model.parameters())
    cache = PagedCache(model.config, count, size, parameter.dtype, parameter.device)
    free, blocks, found = places(count, seed), [[] for _ in texts], [[] for _ in texts]
    for step in schedule(texts, seed):
        segments, ids = [], []
        for number, start, new in step:
            while len(blocks[number]) * size < start + new:
                blocks[number].append(next(free))
            segments.append(Segment(new, start + new, blocks[number]))
            ids += texts[number][start : start + new]
        hidden = model(torch.tensor([ids], device=parameter.device), cache=PagedStep(cache, segments))[0]
        for (number, _, _), its in zip(step, hidden.split([new for _, _, new in step])):
            found[number].append(model.logits(its))
    return [torch.cat(rows) for rows in found]


@torch.inference_mode()
def check(model: Decoder, seeds: int = 2, atol: float = 2e-5, **options) -> None:
    texts = texts_of(model)
    expected = [model.logits(model(torch.tensor([text])))[0] for text in texts]
    for seed in range(seeds):
        found = run(model, texts, seed, (in_order, scattered)[seed % 2], **options)
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_in_any_schedule(kind: str, tmp_path: Path):
    model = model_of(KINDS[kind], tmp_path)
    assert family_of(model.config).model_type == kind.split()[0]
    check(model)


def test_all_families_are_here():
    assert {kind.split()[0] for kind in KINDS} == set(FAMILIES)


@pytest.mark.parametrize("options", [
    {"position_embedding": "alibi", "sliding_window": 5}, {"sliding_window": 7, "full_attention_layers": "1"},
    {"local_filter": True}, {"tie_word_embeddings": True, "embedding_norm": True, "qk_norm": True, "norm": "layernorm"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("names", [{}, {"attention": "plain"}, {"attention": "blocked", "experts": "sorted"}], ids=str)
def test_any_implementation_of_attention(options: dict, names: dict[str, str]):
    model = small(**options)
    use(model, names)
    check(model, size=3)


@torch.inference_mode()
def test_bfloat16_is_as_near_as_without_a_cache():
    model = small(position_embedding="alibi", num_attention_heads=8)
    texts = texts_of(model)
    exact = torch.cat([model.logits(model(torch.tensor([text])))[0] for text in texts])
    model = model.bfloat16()
    alone = torch.cat([model.logits(model(torch.tensor([text])))[0] for text in texts]).float()
    found = torch.cat(run(model, texts, 3, scattered)).float()
    assert (found - exact).square().mean() < 1.2 * (alone - exact).square().mean()


def read_of(cache: PagedCache, blocks: list[int], length: int, first_key: int = 0) -> tuple[Tensor, Tensor]:
    return PagedStep(cache, [Segment(1, length, blocks)]).read(1, 0, first_key)


def filled_cache(num_blocks: int = 8) -> PagedCache:
    """Keys of token n of the pool are n, its values -n; those of the second layer are 100 more."""
    config = small().config
    cache = PagedCache(config, num_blocks, SIZE, torch.float32, CPU)
    slots = torch.arange(num_blocks * SIZE)
    for layer in range(config.num_hidden_layers):
        numbers = (slots + 100.0 * layer)[:, None].expand(2, -1, 8)
        cache.append(layer, slots, numbers, -numbers)
    return cache


def test_blocks_side_by_side_are_read_where_they_are():
    cache = filled_cache()
    assert cache.pool is not None
    for blocks, length, first_key, expected in (
        ([2, 3, 4], 11, 0, [*range(8, 19)]), ([2, 3, 4], 11, 5, [*range(13, 19)]), ([7], 1, 0, [28]),
        ([5, 1, 2], 11, 6, [6, 7, 8, 9, 10]),  # Without the first block, the others are side by side.
        ([3, 2], 6, 0, [12, 13, 14, 15, 8, 9]), ([1, 3, 0], 12, 2, [6, 7, 12, 13, 14, 15, 0, 1, 2, 3]),
    ):  # fmt: skip
        k, v = read_of(cache, blocks, length, first_key)
        assert k[0, 1, :, 3].tolist() == [100.0 + number for number in expected] and torch.equal(v, -k)
        is_run = expected == [*range(expected[0], expected[0] + len(expected))]
        assert (k.untyped_storage().data_ptr() == cache.pool.untyped_storage().data_ptr()) == is_run


def test_blocks_are_copied_all_at_once():
    cache = filled_cache()
    cache.copy([(1, 2), (2, 3), (0, 7)])
    for block, source in enumerate([0, 1, 1, 2, 4, 5, 6, 0]):
        assert read_of(cache, [block], SIZE)[0][0, 0, :, 0].tolist() == [100 + SIZE * source + n for n in range(SIZE)]
    PagedCache(small().config, 2, SIZE, torch.float32, CPU).copy([(0, 1)])  # Before there is anything to copy.


@torch.inference_mode()
def test_two_texts_share_the_blocks_of_their_beginning():
    """A text goes on in two ways; the block in which they part is copied. The filter reads states of that block."""
    model = small(local_filter=True)
    start, ends = [3, 1, 4, 1, 5, 9], ([2, 6, 5], [3, 5])
    cache = PagedCache(model.config, 4, SIZE, torch.float32, CPU)
    model(torch.tensor([start]), cache=PagedStep(cache, [Segment(6, 6, [2, 0])]))
    cache.copy([(0, 3)])
    segments = [Segment(len(end), 6 + len(end), blocks) for end, blocks in zip(ends, ([2, 0, 1], [2, 3]))]
    hidden = model(torch.tensor([[*ends[0], *ends[1]]]), cache=PagedStep(cache, segments))[0]
    for end, its in zip(ends, hidden.split([3, 2])):
        torch.testing.assert_close(its, model(torch.tensor([start + end]))[0, 6:], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_keys_before_the_window_are_not_read():
    model = small(sliding_window=5)
    text = texts_of(model, (20,))[0]
    cache = PagedCache(model.config, 5, SIZE, torch.float32, CPU)
    for start, end in ((0, 14), (14, 17), (17, 18), (18, 20)):
        if cache.pool is not None:
            cache.pool[:, :, : start - 4] = torch.nan
        step = PagedStep(cache, [Segment(end - start, end, range(5))])
        hidden = model(torch.tensor([text[start:end]]), cache=step)[0]
        torch.testing.assert_close(hidden, model(torch.tensor([text]))[0, start:end], atol=1e-5, rtol=1e-5)


LONGROPE = {
    "rope_scaling": "longrope", "rope_short_factor": "1,1.1,1.3,1.5", "rope_long_factor": "1,2,4,8",
    "rope_scaling_factor": 4.0, "original_max_position_embeddings": 8, "max_position_embeddings": 32,
}  # fmt: skip


@torch.inference_mode()
def test_angles_that_depend_on_a_texts_length_are_those_of_its_prompt():
    """Also if it comes in pieces, or is computed again with what followed it."""
    model = small(**LONGROPE)
    for prompt in (5, 12):
        text = texts_of(model, (14,))[0]
        reference = KVCache(model.config, 1, 14, torch.float32, CPU)
        pieces = torch.tensor([text]).split([prompt, *[1] * (14 - prompt)], dim=1)
        expected = torch.cat([model(piece, cache=reference)[0] for piece in pieces])
        for cut in ([14], [3, 11], [prompt - 1, 2, 13 - prompt]):
            cache, end = PagedCache(model.config, 4, SIZE, torch.float32, CPU), 0
            for piece in torch.tensor([text]).split(cut, dim=1):
                end += piece.shape[1]
                hidden = model(piece, cache=PagedStep(cache, [Segment(piece.shape[1], end, range(4), prompt)]))[0]
                torch.testing.assert_close(hidden, expected[end - len(hidden) : end], atol=1e-5, rtol=1e-5)
    assert [length_group(model.config, length) for length in (1, 8, 9, 30)] == [0, 0, 1, 1]
    assert length_group(small().config, 9) == 0


@torch.inference_mode()
def test_parts_of_a_model_have_room_for_their_own_layers():
    whole, parts = small(), [small() for _ in range(3)]
    text, units = texts_of(whole, (7,))[0], (range(2), range(2, 3), range(3, 5))
    hidden = None
    for model, its in zip(parts, units):
        model.keep(its)
        layers = [layer for layer, _ in model.layers.numbered()]
        cache = PagedCache(model.config, 3, SIZE, torch.float32, CPU, layers)
        step = PagedStep(cache, [Segment(7, 7, [2, 0])])
        hidden = model(torch.tensor([text]), cache=step, units=its, entering=hidden)
        assert cache.pool is not None and cache.pool.shape == (2 * len(layers), 2, 12, 8)
    assert torch.equal(hidden, whole(torch.tensor([text])))


def test_bytes_of_a_block_are_those_that_it_takes():
    for options in ({}, {"local_filter": True}, {"num_key_value_heads": 4, "head_dim": 6}):
        model = small(**options)
        cache = PagedCache(model.config, 3, SIZE, torch.bfloat16, CPU)
        with torch.inference_mode():
            model.bfloat16()(torch.tensor([[1, 2]]), cache=PagedStep(cache, [Segment(2, 2, [1])]))
        assert 3 * PagedCache.block_bytes(model.config, SIZE, torch.bfloat16) == cache.num_bytes


def test_what_does_not_fit_is_refused():
    cache = filled_cache()
    for segment in (Segment(1, 9, [0, 1]), Segment(0, 3, [0]), Segment(4, 3, [0])):
        with pytest.raises(ValueError, match="blocks of 4 cannot hold"):
            PagedStep(cache, [segment])
    with pytest.raises(ValueError, match="the segments have 2 new tokens, 3 are given"):
        small()(torch.tensor([[1, 2, 3]]), cache=PagedStep(cache, [Segment(2, 2, [0])]))

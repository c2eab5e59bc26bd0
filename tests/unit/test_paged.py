"""Paged caches: whatever the schedule and the places in the pool, scores are those of whole texts without a cache."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from model import Decoder, ModelConfig, hf
from model.families import FAMILIES, family_of
from model.paged import PagedCache, PagedStep, Segment
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
    cache = PagedCache(model.config, count, size, next(model.parameters()).dtype, CPU)
    free, blocks, found = places(count, seed), [[] for _ in texts], [[] for _ in texts]
    for step in schedule(texts, seed):
        segments, ids = [], []
        for number, start, new in step:
            while len(blocks[number]) * size < start + new:
                blocks[number].append(next(free))
            segments.append(Segment(new, start + new, blocks[number]))
            ids += texts[number][start : start + new]
        hidden = model(torch.tensor([ids]), cache=PagedStep(cache, segments))[0]
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

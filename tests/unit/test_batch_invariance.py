"""Bits of an answer with batch_invariant: whoever else is served, and however its prompt is cut, found in the cache or
computed again."""

import random

import pytest
import torch
from torch import Tensor

from model import Decoder, ModelConfig
from model.config import padded_vocab_size
from model.kernels.experts import experts_reference
from model.tiles import experts_on_all_rows
from serving.invariant import ROWS, InvariantRunner, rows_of
from serving.loading import Served, Speech
from serving.plan import Part
from serving.requests import Request, Sampling
from tests.unit.test_engine import Shaken, engine_of, gather, prompts_of
from tests.unit.test_tokenizer import training_texts
from tokenizer import Tokenizer
from tokenizer.hf_bbpe import train_hf_bbpe

CPU = torch.device("cpu")
TOLD = Sampling(temperature=0.8, seed=3, max_new_tokens=8, logprobs=2, prompt_logprobs=1, ignores_eos=True)
LLAMA = {"num_key_value_heads": 2}
KINDS = {
    "llama": LLAMA,
    "window": {"sliding_window": 9, "num_key_value_heads": 2},
    "alibi": {"position_embedding": "alibi"},
    "filter": {"local_filter": True},
    "mixture": {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_hf_bbpe(training_texts(), 300, show_progress=False)


def served_of(tokenizer: Tokenizer, dtype: torch.dtype = torch.float32, **options) -> Served:
    config = ModelConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=88, **options
    ).resolve(padded_vocab_size(tokenizer.vocab_size), 64)  # fmt: skip
    model, generator = Decoder(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return Served(model.to(dtype), Speech(tokenizer, frozenset([tokenizer.eod_id]), {}))


def answers(engine, prompts: list[tuple[int, ...]]) -> list[tuple]:
    """Tokens and log-probabilities, of prompt and text."""
    said = gather(engine.run([Request(str(n), prompt, TOLD) for n, prompt in enumerate(prompts)]))
    return [(said[str(n), 0].prompt, said[str(n), 0].tokens) for n in range(len(prompts))]


def ways(served: Served, prompts: list[tuple[int, ...]], **options) -> list[list[tuple]]:
    """The same answers in several ways."""

    def engine(**more):
        return engine_of(served, **{"blocks": 60, "prefix_sharing": False} | options | more)

    return [
        [answers(engine(), [prompt])[0] for prompt in prompts],
        answers(engine(max_running=32, tokens_a_step=64, blocks=400), prompts),
        # In other pieces, with other blocks, in a cache that is too small for all, disturbed.
        answers(engine(tokens_a_step=5, max_running=3, scores_a_step=2), prompts),
        answers(engine(kind=Shaken, blocks=25, block_size=2, prefix_sharing=True), prompts),
        # Each prompt is there already.
        answers(engine(prefix_sharing=True, blocks=400, max_running=32), [*prompts, *prompts])[len(prompts) :],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_the_same_in_any_company(tokenizer: Tokenizer, kind: str):
    served = served_of(tokenizer, **KINDS[kind])
    prompts = prompts_of(32, longest=30) if kind == "llama" else prompts_of(5)
    alone, *others = ways(served, prompts, batch_invariant=True)
    assert all(len(tokens) == 8 and len(prompt) > 0 for prompt, tokens in alone)
    for other in others:
        assert other == alone


def test_without_it_tokens_are_the_same_and_bits_are_not(tokenizer: Tokenizer):
    """So this test can fail."""
    alone, *others = ways(served_of(tokenizer, **LLAMA), prompts_of(32, longest=30))
    for other in others:
        for (_, tokens), (_, expected) in zip(other, alone, strict=True):
            assert [token.id for token in tokens] == [token.id for token in expected]
    assert any(other != alone for other in others)


def test_bits_in_bfloat16(tokenizer: Tokenizer):
    served = served_of(tokenizer, torch.bfloat16, **LLAMA)
    try:
        alone, *others = ways(served, prompts_of(5), batch_invariant=True)
    except ValueError as error:
        pytest.skip(str(error))
    assert all(other == alone for other in others)


def test_another_place_with_other_bits_is_refused(tokenizer: Tokenizer):
    served = served_of(tokenizer, **LLAMA)
    norm = served.model.norm
    norm.register_forward_hook(
        lambda _module, _inputs, outputs: (outputs[0], outputs[1] + 1e-7 * torch.arange(ROWS)[:, None])
    )
    with pytest.raises(ValueError, match="--batch_invariant cannot be kept: on this machine, a row of a product in fl"):
        InvariantRunner(served, 4, 4, torch.float32, CPU)


def test_rows_of_a_plan():
    rows = list(rows_of([Part([7, 8, 9], 4, [5, 2], 2), Part([3], 0, [1], 0), Part([4], 1, [6], 1, 9)]))
    assert [(row.token, row.segment.length, list(row.segment.blocks), row.is_wanted) for row in rows] == [
        (7, 5, [5, 2], False), (8, 6, [5, 2], True), (9, 7, [5, 2], True), (3, 1, [1], False), (4, 2, [6], True),
    ]  # fmt: skip
    assert [row.segment.prompt_length for row in rows] == [0, 0, 0, 0, 9]
    assert all(row.segment.num_new == 1 for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_on_all_rows_are_the_reference(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x_NC, gate_up, down = drawn(ROWS, 24), 0.2 * drawn(6, 32, 24), drawn(6, 24, 16)
    draw = random.Random(1)
    # One expert is nobody's.
    chosen_NK = torch.tensor([draw.sample(range(5), 2) for _ in range(ROWS)])
    weights_NK = torch.rand(ROWS, 2, generator=generator)
    found = experts_on_all_rows(x_NC, gate_up, down, chosen_NK, weights_NK)
    torch.testing.assert_close(found, experts_reference(x_NC, gate_up, down, chosen_NK, weights_NK))
    # Other tokens' experts leave no trace.
    chosen_NK[3:] = torch.tensor([5, 0])
    assert torch.equal(experts_on_all_rows(x_NC, gate_up, down, chosen_NK, weights_NK)[:3], found[:3])

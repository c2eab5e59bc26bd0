"""The runner's scores, and the engine's texts where rotary angles depend on a text's length, against whole texts."""

from dataclasses import replace

import pytest
import torch

from model import Decoder
from serving.engine import Engine
from serving.generation import generate
from serving.loading import Served, Speech
from serving.plan import Part, StepPlan
from serving.requests import Request, Sampling
from serving.runner import Runner
from tests.unit.test_engine import Shaken, engine_of, gather, tokenizer
from tests.unit.test_paged import LONGROPE, small
from tests.unit.test_quantized import CONFIG, adapted
from tokenizer import Tokenizer

__all__ = ["tokenizer"]

CPU = torch.device("cpu")


class FewTokens:
    """What a runner needs of a tokenizer."""

    vocab_size = 90


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_of_a_model_in_4_bits_with_an_adapter(dtype: torch.dtype):
    model = adapted(CONFIG, dtype)
    texts = [[5, 9, 2, 60, 41, 7, 7], [5, 9, 2, 3], [88]]
    expected = [model.logits(model(torch.tensor([text])))[0, :, :90].float() for text in texts]
    runner = Runner(Served(model, Speech(FewTokens(), frozenset(), {})), 6, 2, dtype, CPU)  # type: ignore[arg-type]
    assert runner.run(StepPlan([Part([5, 9, 2], 0, [4, 1], 0)], [])).shape == (0, CONFIG.vocab_size)
    # The first text goes on; the second one gets a copy of the block that both would write to.
    parts = [Part([60], 3, [4, 1], 1), Part([88], 0, [0], 1), Part([3], 3, [4, 2], 1)]
    first = runner.run(StepPlan(parts, [(1, 2)]))
    second = runner.run(StepPlan([Part([41, 7, 7], 4, [4, 1, 5, 3], 2)], []))
    wanted = torch.stack([expected[0][3], expected[2][0], expected[1][3], *expected[0][5:]])
    atol = 1e-5 if dtype == torch.float32 else 0.05 * wanted.abs().max().item()
    found = torch.cat([first, second])[:, :90]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


def longrope(tokenizer: Tokenizer) -> Served:
    config = replace(small(**LONGROPE).config, vocab_size=tokenizer.vocab_size, initializer_range=0.3)
    model = Decoder(config)
    model.initialize(0)
    return Served(model, Speech(tokenizer, frozenset({tokenizer.eod_id}), {}))


@pytest.mark.parametrize("kind", [Engine, Shaken])
def test_texts_whose_angles_depend_on_their_prompts_lengths(tokenizer: Tokenizer, kind: type[Engine]):
    """Prompts within the original context and beyond it, of which the short ones begin the long ones."""
    long = [31, 77, 5, 120, 9, 44, 200, 3, 61, 18, 250, 90, 7, 7, 16]
    prompts = [tuple(long[:length]) for length in (4, 15, 7, 12, 8, 9)]
    served = longrope(tokenizer)
    greedy = Sampling(temperature=0.0, max_new_tokens=8, ignores_eos=True)
    expected = [tuple(generate(served.model, list(prompt), 8, frozenset(), 0.0)) for prompt in prompts]
    engine = engine_of(served, 40, kind=kind)
    said = gather(engine.run(Request(str(n), prompt, greedy) for n, prompt in enumerate(prompts)))
    assert [said[str(n), 0].ids for n in range(len(prompts))] == expected
    again = gather(engine.run([Request("again", prompts[1], greedy)]))["again", 0]
    assert again.ids == expected[1] and again.cached == 12

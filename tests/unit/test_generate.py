"""Sampling, stopping and streaming."""

import pytest
import torch

from model import Decoder, ModelConfig
from serving.generation import generate, sample_token
from serving.text import stream_text
from tokenizer.hf_bbpe import train_hf_bbpe


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = ModelConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=0.3,
    ).resolve()  # fmt: skip
    model = Decoder(config)
    model.initialize(0)
    return model.eval()


def test_greedy_equals_the_likeliest_token_of_the_whole_sequence(model: Decoder):
    prompt = [3, 1, 4, 1, 5]
    new = list(generate(model, prompt, 20, frozenset(), temperature=0.0))
    ids = list(prompt)
    for token_id in new:
        with torch.no_grad():
            assert token_id == model.logits(model(torch.tensor([ids])))[0, -1].argmax()
        ids.append(token_id)
    assert new == list(generate(model, prompt, 20, frozenset(), temperature=0.7, top_k=1))


def test_a_stop_token_ends_the_text_and_is_not_shown(model: Decoder):
    """The original never stopped at the end of a document."""
    new = list(generate(model, [7], 20, frozenset(), temperature=1.0, seed=1))
    stop = new[5]
    assert list(generate(model, [7], 20, frozenset([stop]), temperature=1.0, seed=1)) == new[: new.index(stop)]


def test_same_seed_same_text(model: Decoder):
    def draw(seed: int) -> list[int]:
        return list(generate(model, [7], 20, frozenset(), temperature=1.0, seed=seed))

    assert draw(1) == draw(1) != draw(2)
    with pytest.raises(ValueError, match="prompt is empty"):
        list(generate(model, [], 5, frozenset()))


def test_a_text_ends_with_the_context(model: Decoder):
    """However many tokens are requested; the model would go on, with positions that it has never seen."""
    new = list(generate(model, [7] * 54, 500, frozenset(), temperature=0.0))
    assert new == list(generate(model, [7] * 54, 10, frozenset(), temperature=0.0)) and len(new) == 10
    for count in (64, 65, 1000):
        with pytest.raises(ValueError, match=f"the prompt has {count} tokens, and the model knows 64 positions"):
            next(generate(model, [7] * count, 1, frozenset()))


@pytest.mark.parametrize(
    ("top_k", "top_p", "possible"),
    [
        (0, 1.0, {0, 1, 2, 3}),
        (2, 1.0, {0, 1}),
        (0, 0.5, {0}),
        (0, 0.6, {0, 1}),
        (0, 0.85, {0, 1, 2}),
        (3, 0.9, {0, 1, 2}),
    ],
)
def test_top_k_and_top_p(top_k: int, top_p: float, possible: set[int]):
    """Probabilities are 0.5, 0.3, 0.15, 0.05; top-p keeps the fewest whose sum reaches it."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {sample_token(logits, 1.0, top_k, top_p, generator) for _ in range(400)}
    assert drawn == possible


def test_temperature_flattens_and_sharpens():
    logits = torch.tensor([0.6, 0.4]).log()
    generator = torch.Generator().manual_seed(0)

    def share_of_first(temperature: float) -> float:
        return sum(sample_token(logits, temperature, 0, 1.0, generator) == 0 for _ in range(1000)) / 1000

    # softmax of the scaled logits: 0.6^2 / (0.6^2 + 0.4^2) = 0.692 at 0.5, and close to a half at 10.
    assert share_of_first(0.5) == pytest.approx(0.692, abs=0.06)
    assert share_of_first(10.0) == pytest.approx(0.51, abs=0.06)
    assert share_of_first(0.0) == 1.0


def test_streaming_waits_for_whole_characters():
    tokenizer = train_hf_bbpe(["ab abc abcd " * 50] * 3, 262, show_progress=False)
    text = "a中文b🎉c"
    ids = tokenizer.encode(text)
    pieces = list(stream_text(tokenizer, iter(ids)))
    assert "".join(pieces) == text and len(pieces) > 4
    assert not any("\ufffd" in piece for piece in pieces)
    # A text that ends in the middle of a character still shows what came before.
    assert "".join(stream_text(tokenizer, iter(ids[:2]))) == "a\ufffd"

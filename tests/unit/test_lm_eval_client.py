"""lm-eval's client for completions against the server: its scores are those of the model."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="needs requirements-serve.txt")
pytest.importorskip("lm_eval", reason="needs lm-eval, which no requirements file names yet")

from serving.generation import generate, load_model
from tests.served import Server, tiny_tokenizer, write_model

PAIRS = [("def add(a, b):", " return a + b"), ("The", " end"), ("import", " os\nimport sys")]


def test_scores_and_texts_equal_the_models_own(tmp_path: Path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    folder = write_model(tmp_path / "tiny", tiny_tokenizer())
    model, tokenizer, _ = load_model(folder, torch.device("cpu"), torch.float32)
    with Server(folder, tmp_path / "log") as server:
        client = LocalCompletionsAPI(
            base_url=f"http://127.0.0.1:{server.port}/v1/completions", model="tiny", tokenizer=str(folder),
            tokenizer_backend="huggingface", batch_size=2, max_length=256,
        )  # fmt: skip
        scores = client.loglikelihood([
            Instance("loglikelihood", {}, pair, number, ("task", number, 1)) for number, pair in enumerate(PAIRS)
        ], disable_tqdm=True)  # fmt: skip
        until = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
        texts = client.generate_until([Instance("generate_until", {}, ("def add(a, b):", until), 0, ("task", 0, 1))],
                                      disable_tqdm=True)  # fmt: skip
    for (context, continuation), (score, is_greedy) in zip(PAIRS, scores, strict=True):
        whole = tokenizer.encode(context + continuation)
        first = len(tokenizer.encode(context))
        with torch.no_grad():
            logprobs = model.logits(model(torch.tensor([whole])))[0, :, : tokenizer.vocab_size].double().log_softmax(-1)
        own = [logprobs[place - 1, whole[place]].item() for place in range(first, len(whole))]
        assert score == pytest.approx(sum(own), abs=1e-4)
        assert is_greedy == all(logprobs[place - 1].argmax() == whole[place] for place in range(first, len(whole)))
    ids = generate(model, tokenizer.encode("def add(a, b):"), 12, frozenset([tokenizer.eod_id]), 0.0,
                   vocab_size=tokenizer.vocab_size)  # fmt: skip
    assert texts == [tokenizer.decode(list(ids)).split("\n")[0]]

"""DPO's losses, gradients and metrics against figures of TRL, on the same weights and tokens.

The figures are in tests/golden/dpo_trl.json; make_dpo_trl.py beside it renews them. Each figure names its release of
TRL: 1.16.0 no longer has kto_pair or label smoothing of sigmoid. A gradient of kto_pair is missing where TRL's went
through the means, which ours must not (see tests/unit/test_dpo_losses.py).
"""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from dataset.sft import padded
from model import Decoder
from model.config import ModelConfig
from model.families.llama import LLAMA
from tasks.config import DPOConfig, DPOLossType
from tasks.dpo import DPOTask

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dpo_trl.json").read_text())
RESULTS = {
    f"{r['kind']} beta {r['beta']} e {r['label_smoothing']} seed {r['seeds']['policy']} trl {r['trl']}": r
    for r in GOLDEN["results"]
}


def make_model(seed: int) -> Decoder:
    model = Decoder(ModelConfig(**GOLDEN["config"]).resolve())
    model.initialize(seed)
    return model


def sequence(prompt: list[int], answer: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(prompt + answer), np.array([0] * len(prompt) + [1] * len(answer), np.uint8)


def make_batch(reference_seed: int) -> dict[str, torch.Tensor]:
    """The golden pairs, with their log-probabilities under the reference model."""
    sides = ("chosen_ids", "rejected_ids")
    rows = [[sequence(pair["prompt_ids"], pair[side])] for pair in GOLDEN["pairs"] for side in sides]
    ids = torch.arange(len(GOLDEN["pairs"]))
    batch = padded(rows, GOLDEN["config"]["max_position_embeddings"], pad_id=0) | {"sample_ids": ids, "row_ids": ids}
    del batch["document_ids"]
    with torch.no_grad():
        batch["reference"] = DPOTask(make_model(reference_seed), 0, DPOConfig()).log_probs(batch)
    return batch


def test_every_loss_is_covered():
    assert {result["kind"] for result in RESULTS.values()} == set(get_args(DPOLossType))
    versions = {
        version: {r["kind"] for r in RESULTS.values() if r["trl"] == version} for version in ("0.8.6", "1.16.0")
    }
    assert "kto_pair" in versions["0.8.6"] and len(versions["1.16.0"]) == 6
    assert {r["kind"] for r in RESULTS.values() if "gradient_norms" in r} == set(get_args(DPOLossType))


@pytest.mark.parametrize("name", RESULTS)
def test_as_trl_has_it(name: str):
    expected = RESULTS[name]
    batch, model = make_batch(expected["seeds"]["reference"]), make_model(expected["seeds"]["policy"])
    task = DPOTask(model, 0, DPOConfig(expected["kind"], expected["beta"], expected["label_smoothing"]))
    if task.uses_prepass:
        task.take_prepass(task.prepass(batch))
    loss_sum, count, sums = task(batch)
    (loss_sum / count).backward()
    figures = task.figures(loss_sum.item(), count, {name: value.item() for name, value in sums.items()})
    assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    if "gradient_norms" in expected:
        norms = {LLAMA.their_name(name): p.grad.double().norm().item() for name, p in model.named_parameters()}
        assert norms == pytest.approx(expected["gradient_norms"], rel=1e-5)
    for metric, value in expected.get("metrics", {}).items():
        assert figures[metric] == pytest.approx(value, rel=1e-5), metric

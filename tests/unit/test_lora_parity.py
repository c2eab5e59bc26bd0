"""LoRA, rsLoRA and DoRA against PEFT: logits, gradients and 20 steps of AdamW, in float32."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.adapters.lora import LoraLinear
from model.dropout import DropoutKey, dropout
from tests.adapter_cases import CASES, batch, our_model, peft_model, peft_names, run
from tests.golden.make_adapters import OUTPUT, picked_gradients, picked_logits
from tests.peers import peer

GOLDEN = json.loads(OUTPUT.read_text())["results"]


@pytest.mark.parametrize("name", CASES)
def test_as_peft(name: str):
    golden, result = GOLDEN[name], run(our_model(CASES[name]))
    assert picked_logits(result) == pytest.approx(golden["logits"], abs=1e-5)
    assert result.losses == pytest.approx(golden["losses"], abs=1e-5)
    gradients = picked_gradients(result)
    assert gradients.keys() == golden["gradients"].keys()
    for parameter, expected in golden["gradients"].items():
        assert gradients[parameter] == pytest.approx(expected, abs=1e-5), parameter
    assert min(expected[0] for expected in golden["gradients"].values()) > 1e-4


class Masked(nn.Module):
    """Our dropout in a place of PEFT's."""

    def __init__(self, layer: LoraLinear, key: DropoutKey):
        super().__init__()
        self.layer, self.key = layer, key

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.layer.dropout, self.key, self.layer.site)


@pytest.mark.parametrize("name", ["rslora", "dora"])
def test_as_the_installed_peft_with_dropout(name: str, tmp_path: Path):
    peer("peft")
    case = CASES[name]._replace(spec=dataclasses.replace(CASES[name].spec, dropout=0.3))
    ours, tokens = our_model(case), batch(0)
    theirs = peft_model(case, ours, tmp_path / "base").train()
    key, layers = DropoutKey(5, torch.arange(2)), dict(theirs.named_modules())
    for path, layer in ours.named_modules():
        if isinstance(layer, LoraLinear):
            place = layers[f"base_model.model.model.{path}"]
            place.lora_dropout["default"] = Masked(layer, key.for_layer(int(path.split(".")[1])))
    logits = ours.logits(ours(tokens, dropout_key=key))
    expected = theirs(tokens).logits
    assert (logits - ours.logits(ours(tokens))).abs().max() > 1e-2
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    (logits.square().sum() / logits.numel()).backward()
    (expected.square().sum() / logits.numel()).backward()
    parameters, named = dict(theirs.named_parameters()), peft_names(ours)
    for our_name, their_name in named.items():
        gradient = ours.get_parameter(our_name).grad
        torch.testing.assert_close(gradient, parameters[their_name].grad, atol=1e-5, rtol=0)

"""Several adapters of one model: each computes what peft computes, and none leaves a trace."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import Decoder, hf
from model.adapters.switch import Adapters
from tests.adapter_folders import IDS, make_adapter, make_base, scores_by_peft
from tests.peers import peer

peer("peft")
pytest.importorskip("transformers")


@torch.no_grad()
def scores(model: Decoder) -> Tensor:
    return model.logits(model(IDS))


def loaded(base: Path) -> Decoder:
    model = Decoder(hf.read_config(base)).eval()
    hf.load_weights(model, base)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_each_adapter_computes_what_peft_does_and_none_leaves_a_trace(tmp_path: Path, tied: bool):
    base = make_base(tmp_path / "base", tie_word_embeddings=tied)
    made = {
        "plain": {},
        "dora": {"use_dora": True, "use_rslora": True, "target_modules": "all-linear", "lora_dropout": 0.5},
        "whole": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
        if tied else {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    }  # fmt: skip
    model = loaded(base)
    alone, weights = scores(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    memory = {parameter.data_ptr() for parameter in model.parameters()}
    adapters = Adapters(model)
    for number, (name, options) in enumerate(made.items()):
        adapters.add(name, make_adapter(tmp_path / name, base, number, **options))
        assert adapters.active is None and torch.equal(scores(model), alone)
    found = {}
    for name in ["whole", "dora", "plain", "dora", "whole"]:
        adapters.use(name)
        again = found.setdefault(name, scores(model))
        assert torch.equal(scores(model), again)
        torch.testing.assert_close(again, scores_by_peft(base, tmp_path / name), rtol=1e-5, atol=1e-5)
        assert (again - alone).abs().max() > 0.01
    adapters.use(None)
    assert torch.equal(scores(model), alone) and model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    # The same memory, too: nothing was copied.
    assert {parameter.data_ptr() for parameter in model.parameters()} == memory


def test_an_adapter_does_not_lie_in_its_file(tmp_path: Path):
    """Whose changes would reach a server that runs, and whose places change how products are rounded."""
    base = make_base(tmp_path / "base")
    model = loaded(base)
    adapters = Adapters(model)
    adapters.add("a", make_adapter(tmp_path / "a", base))
    adapters.use("a")
    before = scores(model)
    with open(tmp_path / "a" / "adapter_model.safetensors", "r+b") as file:
        file.seek(-64, 2)
        file.write(bytes(64))
    assert torch.equal(scores(model), before)
    assert not any(parameter.data_ptr() % 64 for parameter in model.parameters())


def test_an_unknown_name_and_a_name_given_twice(tmp_path: Path):
    base = make_base(tmp_path / "base")
    adapters = Adapters(loaded(base))
    adapters.add("a", make_adapter(tmp_path / "a", base))
    with pytest.raises(ValueError, match="two adapters are called a: give one another name"):
        adapters.add("a", tmp_path / "a")
    adapters.use("a")
    with pytest.raises(ValueError, match="there is no adapter b: loaded are a"):
        adapters.use("b")
    assert adapters.active == "a" and adapters.names == ["a"]

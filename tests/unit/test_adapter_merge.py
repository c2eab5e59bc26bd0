"""An adapter merged into its base: the same scores as both together and as peft merges them, in bounded memory."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.adapters import merge as merging
from model.hf_files import INDEX
from tests.adapter_folders import load, make_adapter, make_base, scores_by_peft
from tests.peers import peer
from tests.unit.test_adapter_switch import loaded, scores

peer("peft")
pytest.importorskip("transformers")

TIED = {"target_modules": "all-linear", "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
CASES = {
    "lora": ("llama", {}, {}),
    "rslora": ("qwen2", {}, {"use_rslora": True, "target_modules": "all-linear"}),
    "dora": ("llama", {}, {"use_dora": True, "target_modules": "all-linear"}),
    "whole": ("llama", {}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied": ("llama", {"tie_word_embeddings": True}, TIED),
    "bloom": ("bloom", {}, {"target_modules": ["query_key_value", "dense_4h_to_h"]}),
    "experts": ("mixtral", {"num_local_experts": 4}, {"target_modules": ["q_proj", "o_proj"]}),
}


def merge(output: Path, adapter: Path, *flags: str) -> Path:
    assert merging.main([f"--adapter={adapter}", f"--output={output}", *flags]) == 0
    return output


@pytest.mark.parametrize("case", CASES)
def test_the_merged_folder_computes_what_base_and_adapter_do(tmp_path: Path, case: str):
    model_type, shape, options = CASES[case]
    base = make_base(tmp_path / "base", model_type, shard="9KB", **shape)
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    output = merge(tmp_path / "out", adapter, f"--base={base}", "--max_shard_size=9KB")
    together = scores_by_peft(base, adapter)
    assert (together - scores_by_peft(base)).abs().max() > 0.01
    for found in (scores(loaded(output)), scores_by_peft(output), scores_by_peft(base, adapter, is_merged=True)):
        torch.testing.assert_close(found, together, rtol=1e-5, atol=1e-5)
    # Tensor by tensor, too.
    theirs = dict(load(output).named_parameters())
    assert len(json.loads((output / INDEX).read_text())["weight_map"]) >= len(theirs)
    assert len(list(output.glob("*.safetensors"))) > 2


def test_other_dtypes_are_rounded_once_and_what_is_not_merged_keeps_its_bits(tmp_path: Path):
    base, made = tmp_path / "base", make_base(tmp_path / "float32")
    # A folder of two dtypes, as some have for norms.
    (base).mkdir()
    (base / "config.json").write_bytes((made / "config.json").read_bytes())
    tensors = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in
               load_file(made / "model.safetensors").items()}  # fmt: skip
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["v_proj"])
    output = load_file(merge(tmp_path / "out", adapter) / "model.safetensors")
    for name, tensor in tensors.items():
        if "v_proj" in name:
            a, b = (load_file(adapter / "adapter_model.safetensors")[
                f"base_model.model.{name.replace('weight', f'lora_{part}.weight')}"] for part in "AB")  # fmt: skip
            tensor = (tensor.float() + 2.0 * (b @ a)).bfloat16()
        assert output[name].dtype == tensor.dtype and torch.equal(output[name], tensor), name
    whole = load_file(merge(tmp_path / "whole", adapter, "--dtype=float32") / "model.safetensors")
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "float32"


def test_no_more_than_one_file_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Counted: the bytes of all weights that are alive when another one has been read or merged."""
    base = make_base(tmp_path / "base", num_hidden_layers=12, vocab_size=128, shard="20KB")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules="all-linear", r=1)
    alive, most, read = [0], [0], merging.MergedWeights.read

    def count(size: int) -> None:
        alive[0] += size
        most[0] = max(most[0], alive[0])

    def counted(self: merging.MergedWeights, names: list[str]) -> dict[str, torch.Tensor]:
        found = read(self, names)
        for tensor in found.values():
            count(tensor.nbytes)
            weakref.finalize(tensor.untyped_storage(), count, -tensor.nbytes)
        return found

    monkeypatch.setattr(merging.MergedWeights, "read", counted)
    output = merge(tmp_path / "out", adapter, "--max_shard_size=20KB")
    sizes = [path.stat().st_size for path in output.glob("*.safetensors")]
    assert len(sizes) > 6 and sum(sizes) > 6 * most[0] and most[0] <= max(sizes) and not alive[0]


def test_a_merge_that_is_stopped_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = make_base(tmp_path / "base")
    adapter, output, calls = make_adapter(tmp_path / "adapter", base), tmp_path / "new" / "out", []

    def stop_later(*arguments: object) -> None:
        assert not output.exists()
        calls.append(save_file(*arguments))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(merging, "save_file", stop_later)
    with pytest.raises(KeyboardInterrupt):
        merge(output, adapter, "--max_shard_size=9KB")
    assert not list(output.parent.iterdir())


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, other = make_base(tmp_path / "base"), make_base(tmp_path / "other", hidden_size=32)
    adapter = make_adapter(tmp_path / "adapter", base)
    noted = shutil.copytree(adapter, tmp_path / "noted")
    (noted / "adapter_base.json").write_text(json.dumps({"base": str(base), "fingerprint": "another"}))
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    gone = shutil.copytree(noted, tmp_path / "gone")
    (gone / "adapter_base.json").write_text(json.dumps({"base": str(tmp_path / "moved"), "fingerprint": "another"}))
    (tmp_path / "empty").mkdir()
    for flags, sentence in (
        ({"output": base}, "exists: give a new folder"),
        ({"adapter": base}, f"{base} holds a whole model: give the folder of an adapter"),
        ({"adapter": tmp_path / "none"}, "none does not exist"),
        ({"adapter": tmp_path / "empty"}, "empty is neither a run, nor a checkpoint"),
        ({"base": adapter}, "give the base"),
        ({"base": other}, "in the model"),
        ({"adapter": gone}, "moved, which is not there: give its place with --base"),
        ({"adapter": noted}, "was trained on other weights than those in"),
        ({"adapter": pickled}, "only adapter_model.bin, which may run code"),
        ({"max_shard_size": "much"}, "max_shard_size must be a size such as 500MB"),
    ):
        given = {"adapter": adapter, "output": tmp_path / "out"} | flags
        assert merging.main([f"--{name}={value}" for name, value in given.items()]) == 2
        said = capsys.readouterr().err
        assert sentence in said.splitlines()[-1] and said.splitlines()[-1].startswith("merge: "), said
        assert not (tmp_path / "out").exists()

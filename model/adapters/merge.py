"""An adapter merged into its base: a plain folder of Hugging Face, which every program loads without knowing adapters.

python -m model.adapters.merge --base B --adapter A --output O

Weights are read, merged in float32, rounded once and written file by file, so that no more than one file of the output
is in memory, however large the model is. O appears when it is complete. A merge that is killed leaves `.O.tmp-PID`
beside it, which can be deleted.
"""

from utils import environment

if __name__ == "__main__":
    environment.check()

import argparse
import math
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoint.choosing import resolve_checkpoint_dir
from model import hf
from model.adapters.folder import Weights, base_of, fingerprint, is_adapter, require_base, weights_of
from model.adapters.lora import LoraLinear, merged_matrix
from model.adapters.outline import brought, read_adapter
from model.adapters.tokens import WITH_ROWS, TrainedRows, with_rows
from model.families import family_of
from model.families.family import Rule
from model.generation_config import GENERATION_CONFIG, read_adapters_generation_config
from model.hf_files import INDEX, index_of, split_into_files
from tokenizer.base import CHAT_TEMPLATE_NAME
from tokenizer.conversion import BYTE_LEVEL, SENTENCE_PIECE
from tokenizer.loading import has_tokenizer
from utils.arguments import Parser
from utils.files import atomic_write_json, fsync_dir
from utils.options import parse_size
from utils.paths import a_path
from utils.terminal import run_main

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", SENTENCE_PIECE,
    *BYTE_LEVEL, CHAT_TEMPLATE_NAME,
)  # fmt: skip


class MergedWeights:
    """The weights of a base with an adapter merged into them, each computed when it is asked for.

    Args:
        base: folder of the base.
        adapter: folder of the adapter.
        dtype: of the result; None: that of each weight in the base.
    Raises:
        ValueError: a folder cannot be used, or they do not belong together.
        OSError: a disk or a network fails, and may be back later.
    """

    def __init__(self, base: Path, adapter: Path, dtype: torch.dtype | None):
        config = hf.read_config(base)
        self._stored = hf.StoredWeights(base, config)
        outline = read_adapter(adapter, config)
        self._layers: dict[str, LoraLinear] = {}
        self._wholes: dict[str, Tensor] = {}
        self._rows: dict[str, TrainedRows] = {}
        for path, module in brought(outline).items():
            if isinstance(module, LoraLinear):
                self._layers[f"{path}.weight"] = module
            elif isinstance(module, WITH_ROWS):
                self._rows[f"{path}.weight"] = module.token_adapter
            else:
                self._wholes |= {f"{path}.{name}": values for name, values in module.named_parameters()}
        self.config = outline.config
        """Of the result."""
        # Their shapes, with the rows of new tokens.
        shapes = {name: parameter.shape for name, parameter in hf.outline(self.config).named_parameters()}
        self.outlines = {
            name: torch.empty(shapes[name], dtype=dtype or stored.dtype, device="meta")
            for name, stored in self._stored.outlines.items()
        }
        """Name of each parameter -> a tensor of its shape and dtype, without values."""

    @torch.no_grad()
    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of the parameters.

        Raises:
            ValueError: a value of the base is not finite.
            OSError: a disk or a network fails, and may be back later.
        """
        names = list(names)
        found = self._stored.read(name for name in names if name not in self._wholes)
        merged = {name: self._merged(name, found.get(name)).to(self.outlines[name].dtype) for name in names}
        for name, tensor in merged.items():
            if not all(map(math.isfinite, tensor.aminmax())):
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"{name} has values beyond the range of {dtype}: give --dtype=bfloat16 or float32")
        return merged

    def _merged(self, name: str, stored: Tensor | None) -> Tensor:
        if stored is None:
            return self._wholes[name].detach()
        layer = self._layers.get(name)
        if name in self._rows:
            return with_rows(stored, self._rows[name].ids.tolist(), self._rows[name].trainable_tokens_delta)
        if layer is None:
            return stored
        layer.base_layer.weight = nn.Parameter(stored, requires_grad=False)
        merged = merged_matrix(layer)
        # Otherwise all matrices would stay in memory.
        layer.base_layer.weight = nn.Parameter(self.outlines[name], requires_grad=False)
        return merged


def find(base: Path | None, adapter: Path) -> Weights:
    """The folders of a base and an adapter that belong together.

    Args:
        base: a run, a checkpoint or a folder; None: the one that the adapter names.
        adapter: a run, a checkpoint or a folder.
    Raises:
        ValueError: they are not what they should be, or do not belong together.
        OSError: a disk or a network fails, and may be back later.
    """
    found = resolve_checkpoint_dir(adapter)
    if base is not None:
        weights = weights_of(resolve_checkpoint_dir(base), found)
    elif is_adapter(found):
        weights = Weights(base_of(found, "give its place with --base"), found)
    else:
        raise ValueError(f"{adapter} holds a whole model: give the folder of an adapter")
    require_base(weights, fingerprint(weights.base))
    return weights


def merge(weights: Weights, output: Path, dtype: torch.dtype | None, max_bytes: int) -> None:
    """Write the folder of a base with an adapter merged into it.

    Args:
        weights: base and adapter.
        output: the new folder.
        dtype: of its weights; None: as in the base.
        max_bytes: see split_into_files.
    Raises:
        ValueError: a folder cannot be used, they do not belong together, or the output exists.
        OSError: a disk fails or is full.
    """
    if output.exists():
        raise ValueError(f"{output} exists: give a new folder")
    base, adapter = weights
    assert adapter is not None
    merged = MergedWeights(base, adapter, dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        _write_weights(merged, temporary, max_bytes)
        _write_others(merged, base, adapter, temporary)
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        fsync_dir(temporary)
        os.rename(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_dir(output.parent)


def _write_weights(weights: MergedWeights, directory: Path, max_bytes: int) -> None:
    family = family_of(weights.config)
    rules = hf.written_rules(family, weights.config, list(weights.outlines))
    outlines = hf.converted(weights.outlines, rules)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in outlines.items()}
    files = split_into_files(sizes, max_bytes)
    for file, names in files.items():
        save_file(_tensors(weights, rules, set(names)), directory / file, {"format": "pt"})
        # safetensors makes its files readable for the owner only.
        os.chmod(directory / file, 0o644)
    if len(files) > 1:
        num_parameters = sum(tensor.numel() for tensor in outlines.values())
        atomic_write_json(directory / INDEX, index_of(files, num_parameters, sum(sizes.values())))


def _tensors(weights: MergedWeights, rules: list[Rule], wanted: set[str]) -> dict[str, Tensor]:
    """Tensors of a file. One rule after the other, so that nothing but them stays in memory."""
    found: dict[str, Tensor] = {}
    for rule in rules:
        if not wanted.isdisjoint(rule.theirs):
            tensors = hf.converted(weights.read(rule.ours), [rule])
            found |= {name: tensor.contiguous() for name, tensor in tensors.items() if name in wanted}
    return found


def _write_others(weights: MergedWeights, base: Path, adapter: Path, directory: Path) -> None:
    """Write the configurations, and copy the tokenizer: the adapter's if it has one, otherwise the base's."""
    config, family = weights.config, family_of(weights.config)
    generation = read_adapters_generation_config(base, adapter)
    dtype = weights.outlines["embed_tokens.weight"].dtype
    values = hf.to_hf_config(config, dtype, family=family)
    atomic_write_json(directory / "config.json", values | generation.token_ids)
    atomic_write_json(directory / GENERATION_CONFIG, generation.to_hf())
    source = adapter if has_tokenizer(adapter) else base
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments of the command line.

    Raises:
        SystemExit: an unknown argument, or --help.
    """
    parser = Parser(prog="python -m model.adapters.merge", description="Merge an adapter into its base.")
    folder = "a run, a checkpoint or a folder"
    parser.add_argument("--base", type=a_path, help=f"the model: {folder} (default: the one that the adapter names)")
    parser.add_argument("--adapter", type=a_path, required=True, help=f"the adapter: {folder}")
    parser.add_argument("--output", type=a_path, required=True, help="folder to write, which must not exist")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: that of the base's weights")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file of weights (default: 5GB)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        max_bytes = parse_size(args.max_shard_size)
        weights = find(Path(args.base) if args.base else None, Path(args.adapter))
        merge(weights, Path(args.output), DTYPES.get(args.dtype), max_bytes)
    except (ValueError, OSError) as error:
        print(f"merge: {error}", file=sys.stderr)
        return 2
    print(f"merged into {args.output}")
    return 0


if __name__ == "__main__":
    run_main(main)

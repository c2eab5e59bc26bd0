"""Log-probabilities of DPO's answers under the reference model: computed once by all ranks, and kept on disk.

The reference model is the one that training starts from. So its log-probabilities are computed before the first step,
with the model that is in memory anyway, and no second one is needed. The file's name is a hash of everything that
decides its content. It lies beside the data, where other runs on the same data and weights find it. A run that is
killed meanwhile continues after the blocks that it has written.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from dataset.dpo import DPODataset
from model import ModelConfig
from model.adapters.folder import CONFIG, TENSORS
from runs.exits import StopRequested
from tasks.dpo import DPOTask
from utils.files import atomic_write, is_passing, sha256_of_file

logger = logging.getLogger(__name__)

REFERENCE_DIR = "reference"
_BATCHES_A_BLOCK = 16
"""Batches of each rank in a block."""
_PAIR_BYTES = 8
_SECONDS_A_LINE = 30.0


class ReferenceCache:
    """File of one set's log-probabilities, there already or not yet.

    Args:
        weights: fingerprint of the reference model's weights and dtype.
        out_dir: run directory, for unfinished work, and for the file if the data directory cannot be written to.
    """

    def __init__(self, dataset: DPODataset, split: str, weights: str, out_dir: Path):
        key = hashlib.sha256(f"{dataset.fingerprint} {weights}".encode()).hexdigest()[:16]
        name = f"{split}-{key}.safetensors"
        self.dataset, self.split = dataset, split
        self._shape = (len(dataset), 2)
        self._places = [dataset.sequences.data_dir / REFERENCE_DIR / name, out_dir / REFERENCE_DIR / name]
        self._unfinished = (out_dir / REFERENCE_DIR / name).with_suffix(".part")

    def read_on_main(self, is_main: bool, all_sum: Callable[[Tensor], Tensor]) -> np.ndarray | None:
        """Result of `read` on rank 0, for every rank: nodes need not share a file system."""
        found = self.read() if is_main else None
        if not all_sum(torch.tensor([found is not None], dtype=torch.int64)).item():
            return None
        # The others bring zeros, so the sum is rank 0's.
        values = torch.zeros(self._shape) if found is None else torch.from_numpy(found.copy())
        return all_sum(values).numpy()

    def read(self) -> np.ndarray | None:
        """Log-probabilities, float32 (pairs, 2); None if there is no whole file.

        Raises:
            OSError: a file cannot be read now. (Its values may be all that remains of the reference model.)
        """
        for path in self._places:
            try:
                path.stat()
                with safe_open(path, framework="numpy") as file:
                    values, digest = file.get_tensor("log_probs"), (file.metadata() or {}).get("sha256")
            except SafetensorError:
                continue
            except OSError as error:
                if is_passing(error):
                    raise
                continue
            if values.shape == self._shape and digest == hashlib.sha256(values.tobytes()).hexdigest():
                return values
        return None

    def read_unfinished(self, block: int) -> np.ndarray:
        """Log-probabilities of the whole blocks that a killed run has written, (n, 2)."""
        try:
            raw = self._unfinished.read_bytes()
        except FileNotFoundError:
            raw = b""
        whole = len(raw) // (_PAIR_BYTES * block) * block
        self._unfinished.parent.mkdir(parents=True, exist_ok=True)
        self._unfinished.write_bytes(raw[: whole * _PAIR_BYTES])
        return np.frombuffer(raw, "<f4", 2 * whole).reshape(-1, 2)

    def append(self, values: np.ndarray) -> None:
        with open(self._unfinished, "ab") as file:
            file.write(values.astype("<f4").tobytes())
            file.flush()
            os.fsync(file.fileno())

    def write(self, values: np.ndarray) -> Path:
        """Write the file; returns its path."""
        values = np.ascontiguousarray(values, "<f4")
        content = save({"log_probs": values}, {"sha256": hashlib.sha256(values.tobytes()).hexdigest()})
        for path in self._places:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, content)
            except OSError:
                if path == self._places[-1]:
                    raise
            else:
                self._unfinished.unlink(missing_ok=True)
                return path
        raise AssertionError


_FIRST = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range",
    "tie_word_embeddings", "attention_bias", "qkv_bias", "rope_theta", "rope_scaling", "rope_scaling_factor",
    "rope_low_freq_factor", "rope_high_freq_factor", "original_max_position_embeddings", "hidden_dropout",
    "attention_dropout", "residual_in_fp32",
})  # fmt: skip
_YOUNGER = [field.name for field in fields(ModelConfig) if field.name not in _FIRST]
_FOR_TRAINING = {"model_type", "router_aux_loss_coef", "router_aux_loss", "router_z_loss_coef",
                 "router_bias_update_rate"}  # fmt: skip
"""Fields that do not change what a model computes."""


def weights_fingerprint(
    directory: Path, config: ModelConfig, dtype: torch.dtype, adapter: Path | None = None, in_4bit: bool = False
) -> str:
    """Fingerprint of the function that a model of this configuration and dtype computes with a folder's weights.

    Args:
        adapter: folder of an adapter for them.
        in_4bit: whether the model keeps its frozen matrices in 4 bits.
    """
    content = [[path.name, sha256_of_file(path)] for path in sorted(directory.glob("model*.safetensors"))]
    if adapter is not None:
        content += [[path.name, sha256_of_file(path)] for path in (adapter / CONFIG, adapter / TENSORS)]
    if in_4bit:
        content.append(["4 bits", ""])
    # Nothing is dropped while the reference is computed, and most models take any length.
    without = {"hidden_dropout", "attention_dropout"} | _FOR_TRAINING
    without |= {"max_position_embeddings"} if config.rope_scaling == "none" else set()
    # A field that is younger than the first caches counts where it makes another model.
    without |= {name for name in _YOUNGER if getattr(config, name) == getattr(ModelConfig, name)}
    shape = {name: value for name, value in asdict(config).items() if name not in without}
    if config.rope_scaling == "dynamic":
        # It once depended on the width of a batch; values of that time do not belong to this model.
        shape["scaled_by"] = "length"
    return hashlib.sha256(json.dumps([content, shape, str(dtype)]).encode()).hexdigest()


@torch.no_grad()
def compute_reference(
    task: DPOTask,
    cache: ReferenceCache,
    batch_size: int,
    data_rank: int,
    data_size: int,
    all_sum: Callable[[Tensor], Tensor],
    to_device: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    beat: Callable[[], None] = lambda: None,
    stop_requested: Callable[[], bool] = lambda: False,
    equally_many: bool = False,
    counts: bool = True,
) -> np.ndarray:
    """Compute missing log-probabilities on all ranks together; returns float32 (pairs, 2) on each.

    Args:
        data_rank, data_size: see TrainLoader.
        all_sum: sums a CPU tensor over the ranks, in place.
        beat: called once a batch.
        stop_requested: whether this rank was asked to stop.
        equally_many: let each rank do as many forward passes, also beyond its own batches.
        counts: whether this one, of the ranks with this data rank, contributes what they compute.
    Raises:
        StopRequested: a rank was. Finished blocks are kept.
    """
    dataset, is_main = cache.dataset, counts and data_rank == 0
    block = _BATCHES_A_BLOCK * data_size * batch_size
    values = torch.zeros(len(dataset), 2, dtype=torch.float32)
    unfinished = cache.read_unfinished(block) if is_main else np.empty((0, 2), np.float32)
    values[: len(unfinished)] = torch.from_numpy(unfinished.copy())
    # The others have zeros, so the sum is rank 0's.
    done = int(all_sum(torch.tensor([len(unfinished)]))[0])
    all_sum(values[:done])
    was_training, started = task.model.training, time.monotonic()
    task.model.eval()
    said, first = started, done
    for begin in range(done, len(dataset), block):
        end = min(begin + block, len(dataset))
        starts = range(begin, end, batch_size)
        last = -(-len(starts) // data_size) * data_size if equally_many else len(starts)
        for number in range(data_rank, last, data_size):
            start = starts[number % len(starts)]
            ids = np.arange(start, min(start + batch_size, end), dtype=np.int64)
            batch = dataset.collate(ids) | {"row_ids": torch.from_numpy(ids)}
            log_probs = task.log_probs(to_device(batch)).float().cpu()
            if counts and number < len(starts):
                values[start : start + len(ids)] = log_probs
            beat()
        all_sum(values[begin:end])
        if is_main:
            cache.append(values[begin:end].numpy())
        if all_sum(torch.tensor([stop_requested()], dtype=torch.int64)).item():
            raise StopRequested
        if time.monotonic() - said > _SECONDS_A_LINE:
            said = time.monotonic()
            left = (said - started) / (end - first) * (len(dataset) - end)
            logger.info("reference: %d of %d pairs, %.0f s left", end, len(dataset), left)
    task.model.train(was_training)
    if is_main:
        path = cache.write(values.numpy())
        logger.info(
            "reference log-probabilities of %d %s pairs computed in %.1f s, kept in %s",
            len(dataset), cache.split, time.monotonic() - started, path,
        )  # fmt: skip
    return values.numpy()

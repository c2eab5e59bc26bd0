"""Open the set that a task trains on."""

from pathlib import Path

from dataset.dpo import DPODataset
from dataset.pretrain import PretrainDataset
from dataset.sft import SFTDataset

TaskDataset = PretrainDataset | SFTDataset | DPODataset


def open_dataset(
    task: str, data_dir: str | Path, split: str, max_seq_len: int, document_mask: bool = True, packing: bool = True
) -> TaskDataset:
    """
    Args:
        task: "pretrain", "sft" or "dpo"; document_mask is for the first, packing for the second.
    Raises:
        ValueError: no data for this task there, or damaged.
    """
    if task == "sft":
        return SFTDataset(data_dir, split, max_seq_len, packing)
    if task == "dpo":
        return DPODataset(data_dir, split, max_seq_len)
    return PretrainDataset(data_dir, split, max_seq_len, document_mask)

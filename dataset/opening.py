"""The kinds of pretokenized data, and the class that reads each. Tasks name the kind that they train on."""

from pathlib import Path

from dataset.dpo import DPODataset
from dataset.format import MANIFEST_NAME
from dataset.pretrain import PretrainDataset
from dataset.sequences import read_manifest
from dataset.sft import SFTDataset

TaskDataset = PretrainDataset | SFTDataset | DPODataset


def kind_of(data_dir: Path) -> str:
    """Kind of the data in a pretokenized directory.

    Raises:
        ValueError: its manifest is damaged.
    """
    has_manifest = (data_dir / MANIFEST_NAME).exists()
    return read_manifest(data_dir).get("task", "pretrain") if has_manifest else "pretrain"


def open_dataset(
    kind: str, data_dir: str | Path, split: str, max_seq_len: int, document_mask: bool = True, packing: bool = True
) -> TaskDataset:
    """Open one set of a pretokenized directory.

    Args:
        kind: "pretrain" (which takes document_mask), "sft" (which takes packing) or "dpo".
    Raises:
        ValueError: there is no data of this kind, or it is damaged.
    """
    if kind == "sft":
        return SFTDataset(data_dir, split, max_seq_len, packing)
    if kind == "dpo":
        return DPODataset(data_dir, split, max_seq_len)
    return PretrainDataset(data_dir, split, max_seq_len, document_mask)

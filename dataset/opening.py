"""The kinds of pretokenized data, and the class that reads each. Tasks name the kind that they train on.

Where a directory is expected, the name of a mixture may stand (mixture_spec.py).
"""

from fractions import Fraction
from pathlib import Path
from typing import Any

from dataset.dpo import DPODataset
from dataset.format import MANIFEST_NAME
from dataset.mixture import MixtureDataset
from dataset.mixture_spec import MixtureSpec, Source, directories_of, is_mixture, read_mixture
from dataset.pretrain import PretrainDataset
from dataset.sequences import read_manifest
from dataset.sft import SFTDataset

TaskDataset = PretrainDataset | MixtureDataset | SFTDataset | DPODataset


def kind_of(data_dir: Path) -> str:
    """Kind of the data in a pretokenized directory.

    Raises:
        ValueError: its manifest is damaged.
    """
    first = directories_of(data_dir)[0]
    has_manifest = (first / MANIFEST_NAME).exists()
    return read_manifest(first).get("task", "pretrain") if has_manifest else "pretrain"


def open_dataset(
    kind: str, data_dir: str | Path, split: str, max_seq_len: int, document_mask: bool = True, packing: bool = True
) -> TaskDataset:
    """Open one set of a pretokenized directory.

    Args:
        kind: "pretrain" (which takes document_mask), "sft" (which takes packing) or "dpo".
    Raises:
        ValueError: there is no data of this kind, or it is damaged.
    """
    if is_mixture(data_dir):
        if kind != "pretrain":
            raise ValueError(
                f"{data_dir} is a mixture, which pretraining takes alone: put the records for {kind} into one directory"
            )
        spec = read_mixture(data_dir)
        parts = [_part(source, split, max_seq_len, document_mask) for source in spec.sources]
        mixture = MixtureDataset(spec, parts)
        return mixture.in_own_order() if split == "valid" else mixture
    if kind == "sft":
        return SFTDataset(data_dir, split, max_seq_len, packing)
    if kind == "dpo":
        return DPODataset(data_dir, split, max_seq_len)
    return PretrainDataset(data_dir, split, max_seq_len, document_mask)


def _part(source: Source, split: str, max_seq_len: int, document_mask: bool) -> PretrainDataset:
    try:
        return PretrainDataset(source.path, split, max_seq_len, document_mask)
    except ValueError as error:
        raise ValueError(f"source {source.name} of the mixture: {error}") from None


def mixture_of_record(start: dict[str, Any], beside: Path) -> MixtureDataset:
    """The training set of a mixture that a start record names.

    Args:
        beside: the run's own data; only for the sentences.
    Raises:
        ValueError: a source is not there any more, or the record is damaged.
    """
    try:
        sources = [Source(str(source["name"]), Path(source["dir"])) for source in start["mixture"]["sources"]]
        length = int(start["max_seq_len"])
    except (LookupError, TypeError, ValueError):
        raise ValueError(f"the record of the mixture {beside} is damaged") from None
    spec = MixtureSpec(tuple(sources), ((Fraction(0), (Fraction(1),) * len(sources)),))
    return MixtureDataset(spec, [_part(source, "train", length, True) for source in sources])

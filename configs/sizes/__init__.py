"""--size: one word for a machine, which stands for a model, a batch, a learning rate and a context.

A size is a file beside this one. What it says counts where nothing else does: below the command line, a YAML file, and
the saved configuration of a resumed run. Its parts say when they count:

    model        a new model; with --init_from the weights bring their shape
    every_task   always
    pretrain     pretraining; in SFT and DPO the batch is chosen from the data (training/batch.py)
    sft, dpo     that task
    pretrain_continued    pretraining with --init_from, above `pretrain`
"""

from pathlib import Path
from typing import Any

from utils.small_files import parse_yaml

FOLDER = Path(__file__).resolve().parent
"""Found from here, whatever the working directory is."""


def values_of(size: str, task_type: str, has_weights: bool) -> dict[str, Any]:
    """What a size says of a run, by flat names.

    Args:
        size: one of the files' names.
        task_type: one of tasks/config.py.
        has_weights: whether the run begins with those of --init_from.
    """
    said = parse_yaml((FOLDER / f"{size}.yaml").read_bytes())
    parts = [] if has_weights else ["model"]
    parts += ["every_task", task_type]
    parts += [f"{task_type}_continued"] if has_weights else []
    return {name: value for part in parts for name, value in said.get(part, {}).items()}

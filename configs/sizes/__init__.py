"""--size: one word for a machine, which stands for a model, a batch, a learning rate and a context.

A size is a file in this folder. Its values are defaults: the command line, a YAML file and the saved configuration of a
resumed run override them. The parts of the file say when they count:

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
"""Folder of the sizes, whatever the working directory."""


def values_of(size: str, task_type: str, has_weights: bool) -> dict[str, Any]:
    """Values that a size gives a run, by name.

    Args:
        size: name of a file, without its ending.
        task_type: one of tasks/config.py.
        has_weights: whether the run begins with the weights of --init_from.
    """
    said = parse_yaml((FOLDER / f"{size}.yaml").read_bytes())
    assert isinstance(said, dict)
    parts = [] if has_weights else ["model"]
    parts += ["every_task", task_type]
    parts += [f"{task_type}_continued"] if has_weights else []
    return {name: value for part in parts for name, value in said.get(part, {}).items()}

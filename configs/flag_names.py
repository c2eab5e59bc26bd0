"""Names that are not flags, but that people write for one: other programs' and older ones."""

import difflib
from collections.abc import Collection

_OTHER_NAMES = {
    "batch_size": "train_batch_size", "lr": "learning_rate", "epochs": "epoch", "num_epochs": "epoch",
    "max_steps": "max_iters", "steps": "max_iters", "grad_accum": "gradient_accumulation_steps",
    "block_size": "max_seq_len", "context_length": "max_seq_len", "fp16": "dtype=float16", "bf16": "dtype=bfloat16",
    "gpus": "nproc", "num_gpus": "nproc", "devices": "nproc", "nproc_per_node": "nproc", "num_processes": "nproc",
    "model": "init_from", "model_name_or_path": "init_from", "config": "exp_config_file",
    "dropout": "hidden_dropout",
}  # fmt: skip
"""Name in other programs -> our flag, where similar spelling alone would suggest a wrong one."""

_RENAMED = {
    "hidden_dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "dropout1": "hidden_dropout",
    "dropout2": "hidden_dropout",
}
_REMOVED = {
    "grad_div_total_tokens": "leave it out: the loss is always divided by the global batch's supervised tokens",
    "grad_scaling_before_comm": "leave it out: the loss is always scaled before the backward pass",
    "reslog_dir": "leave it out: results are always in out_dir/reslog.jsonl",
    "reslog_run_name": "leave it out: a run's name is its out_dir",
    "reslog_save_interval": "leave it out: every record is written at once; --log_interval sets how often",
    "num_cpus": "write --num_threads",
    "sft_type": "leave it out: each record's format is told from its fields",
    "ignore_index": "leave it out: what is not supervised never counts",
    "use_peft": "write --lora_r for an adapter",
}


def check_name(name: str, prefix: str, known: Collection[str]) -> None:
    """Refuse a name that is not a flag, and suggest the one that was meant.

    Args:
        prefix: "--" on a command line, "" in a YAML file.
        known: names of all flags.
    Raises:
        ValueError: the name is not among them.
    """
    if name in known:
        return
    if name in _RENAMED:
        raise ValueError(f"{prefix}{name} is now called {prefix}{_RENAMED[name]}")
    if name in _REMOVED:
        raise ValueError(f"{prefix}{name} has no use here: {_REMOVED[name]}")
    as_usual = {flag.lower(): flag for flag in known}
    close = difflib.get_close_matches(name.lower(), as_usual, n=1)
    close = [_OTHER_NAMES.get(name) or as_usual[close[0]]] if close or name in _OTHER_NAMES else []
    hint = f"did you mean {prefix}{close[0]}?" if close else "--help lists all flags"
    raise ValueError(f"{prefix}{name} is unknown: {hint}")

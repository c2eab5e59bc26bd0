"""Evaluate a trained model by tasks of lm-eval, and by our own, which need no downloads.

python evaluate_model.py --model RUN --tasks zero
python evaluate_model.py --model RUN --tasks hellaswag,gsm8k --limit 100 --data_dir DATA
python evaluate_model.py --model FOLDER --adapter DIR --tasks humaneval --chat --allow_code_execution
torchrun --nproc_per_node=2 evaluate_model.py --model RUN --tensor_model_parallel_size=2 --tasks mmlu

docs/evaluation.md says more. Killed and started again, it asks nothing twice.
"""

from utils import environment

if __name__ == "__main__":
    environment.check()

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.choosing import resolve_checkpoint_dir
from evaluation.arguments import command_of, names_of, options_of, parse, require_lm_eval
from parallel.launched import launched_rank
from serving.arguments import parse_adapters
from utils.files import sha256_of_file
from utils.terminal import INTERRUPTED, run_main

if TYPE_CHECKING:
    from evaluation.task import Options
    from serving.opening import Opened


def tell(text: str) -> None:
    if launched_rank() == 0:
        print(f"evaluate_model: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        options, adapters = options_of(args), parse_adapters(args.adapter)
        if len(adapters) > 1:
            raise ValueError("one model is evaluated at a time: give one --adapter")
        from evaluation.running import choose

        names = names_of(args.tasks)
        chosen = choose(names)
        chosen.require_use_of(options)
        require_lm_eval(chosen.others)
        checkpoint = resolve_checkpoint_dir(Path(args.model))
        adapters = {name: resolve_checkpoint_dir(path) for name, path in adapters.items()}
        adapter = next(iter(adapters.values()), None)
        # From here on torch is imported, which takes seconds: mistakes in the command are reported before.
        from evaluation.answering import engine_options
        from serving.opening import opened

        logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="evaluate_model: %(message)s")
        with opened(_with_model(args, checkpoint), adapters, engine_options) as own:
            # The other ranks have done their part when they come here.
            if own is not None:
                command = command_of(sys.argv[1:] if argv is None else argv)
                run(args, own, names, options, checkpoint, adapter, command)
        return 0
    except (ValueError, OSError) as error:
        tell(str(error))
        return 2
    except KeyboardInterrupt:
        tell("interrupted: the answers so far are kept, and the same command goes on from there")
        return INTERRUPTED


def _with_model(args: argparse.Namespace, path: Path) -> argparse.Namespace:
    """The flags, with a checkpoint in place of its run, which may save another one meanwhile."""
    return argparse.Namespace(**vars(args) | {"model": str(path)})


def run(
    args: argparse.Namespace, own: "Opened", names: Sequence[str], options: "Options", checkpoint: Path,
    adapter: Path | None, command: str,
) -> None:  # fmt: skip
    """Evaluate, keep what each task finds, and print it all.

    Args:
        checkpoint: of the model.
        adapter: that is used on it, if it is named apart.
        command: which gave these figures.
    Raises:
        ValueError: a task cannot be run.
        OSError: the folder cannot be written.
    """
    from evaluation.answering import EngineAnswerer
    from evaluation.folder import EvaluationFolder, place_of
    from evaluation.journal import Journal
    from evaluation.progress import Progress, duration
    from evaluation.running import evaluate
    from evaluation.table import figures_of, table_of

    model = facts_of(args, own, checkpoint, adapter)
    directory = Path(args.output_dir) if args.output_dir else place_of(checkpoint, model["step"], adapter)
    folder = EvaluationFolder(directory, model, command)
    answerer = Progress(EngineAnswerer(own.served, own.engine, own.served.active))
    journal = Journal(answerer, directory, model["fingerprint"])
    results, failure = [], None
    try:
        for outcome in evaluate(names, journal, options):
            folder.take(outcome)
            results.append(outcome.result)
            tell(f"{outcome.result.name}: {figures_of(outcome.result)} ({duration(outcome.result.seconds)})")
    except ValueError as error:
        # The tasks that ended are told first.
        failure = error
    finally:
        journal.close()
    if failure is not None and not results:
        raise failure
    if journal.num_known:
        tell(f"{journal.num_known:,} answers were known from before, {journal.num_asked:,} are new")
    print(table_of(results), flush=True)
    tell(f"all of it is in {directory}")
    if failure is not None:
        raise failure


def facts_of(args: argparse.Namespace, own: "Opened", checkpoint: Path, adapter: Path | None) -> dict[str, Any]:
    """What is evaluated, as Results has it."""
    from evaluation.folder import digest_of_weights
    from model.adapters.folder import weights_of
    from serving.offers import step_of

    base, within = weights_of(checkpoint)
    used = adapter or within
    parameter = next(own.served.model.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.") + (", blocks in 4 bits" if args.load_in_4bit else "")
    facts = {
        "path": str(base.absolute()), "step": step_of(used or base),
        "adapter": None if used is None else str(used.absolute()), "dtype": dtype, "device": parameter.device.type,
    }  # fmt: skip
    speech = own.served.speech_of(own.served.active)
    fingerprint = _fingerprint(base, used, facts, [speech.tokenizer.fingerprint, sorted(speech.stop_ids)])
    # Training, which evaluates its checkpoints, too, does not read them again.
    weights = fingerprint if facts["step"] is None else digest_of_weights(used or base)
    return facts | {"weights": weights, "fingerprint": fingerprint}


def _fingerprint(base: Path, adapter: Path | None, facts: Mapping[str, Any], others: Sequence[Any]) -> str:
    """Digest of weights and configurations, and of whatever else decides an answer."""
    from model.adapters.folder import TENSORS, fingerprint

    folders, weights = [base], [fingerprint(base)]
    if adapter is not None:
        folders.append(adapter)
        weights.append(sha256_of_file(adapter / TENSORS))
    configurations = [
        path.read_text(encoding="utf-8") for folder in folders for path in sorted(folder.glob("*config.json"))
    ]
    known = [weights, configurations, facts["dtype"], facts["device"], *others]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


if __name__ == "__main__":
    run_main(main, goes_on=True)

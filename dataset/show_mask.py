"""Show which tokens of conversations or preferences are supervised, in the terminal and as a page.

    python -m dataset.show_mask FILE --tokenizer_dir T [--sft_loss last] [--html mask.html]
    python -m dataset.show_mask DIR
    python -m dataset.show_mask RUN [--position 1000]

FILE holds raw records, which go through the same code as in pretokenizing. DIR was pretokenized, and its samples are
shown. Of RUN, the data that it was trained on are shown; at one position of its stream, all sequences that share the
row. Supervised tokens, which the model learns to say, are green; with --color never they stand in brackets. Control
tokens are blue, so that they can be told from text that spells one out.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import html
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from data_preprocess.mask_compiler import TrainingSample
from data_preprocess.readers import BadRecord, Record, holds_records, place, plan_units, read_unit, well_known_endings
from data_preprocess.record_compiler import (
    Compiler,
    CompilerOptions,
    add_compiling_arguments,
    compiler_options_from,
)
from data_preprocess.sequence_job import record_corpus
from dataset.format import MANIFEST_NAME, SPLITS
from dataset.mixture import MixtureDataset
from dataset.opening import kind_of, open_dataset
from dataset.pretrain import PretrainDataset
from dataset.sequences import SequenceSet, read_manifest
from dataset.trained_on import TrainedOn, is_run, read_trained_on
from tokenizer import Tokenizer, load_tokenizer
from utils.arguments import Parser
from utils.files import atomic_write
from utils.paths import a_path, absent
from utils.terminal import run_main, visible

_GREEN, _BLUE, _DIM, _RESET = "\x1b[30;42m", "\x1b[36m", "\x1b[2m", "\x1b[0m"
_UNIT_BYTES = 1 << 24
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Shown:
    """A sequence and its origin; without tokens, a record from which nothing is learnt, and the reason."""

    title: str
    ids: list[int]
    supervised: list[bool]
    parts: tuple[tuple[int, str], ...] = ()
    """Parts of a raw record, in order, as (first token, the message to which it belongs)."""


@dataclass(frozen=True)
class Piece:
    """The smallest group of tokens that makes whole characters."""

    text: str
    ids: tuple[int, ...]
    supervised: bool
    is_control: bool


def pieces(tokenizer: Tokenizer, ids: list[int], supervised: list[bool]) -> Iterator[Piece]:
    """Pieces of a sequence for showing. The tokens of a piece are all supervised, or none is."""
    control = set(tokenizer.special_ids.values())
    waiting: list[int] = []
    for index, (token_id, learnt) in enumerate(zip(ids, supervised)):
        waiting.append(token_id)
        text = tokenizer.decode(waiting)
        goes_on = index + 1 < len(ids) and supervised[index + 1] == learnt and ids[index + 1] not in control
        if text.endswith("\ufffd") and goes_on:
            continue
        yield Piece(text, tuple(waiting), bool(learnt), token_id in control)
        waiting = []


def records_of_file(path: Path, tokenizer: Tokenizer, options: CompilerOptions) -> Iterator[Shown]:
    """Sequences that the records of a file become.

    Raises:
        ValueError: there is no such file, or it holds no records.
    """
    if not path.is_file() or not holds_records(path.name):
        inside = next((one for one in sorted(path.glob("*")) if holds_records(one.name)), None)
        raise ValueError(
            f"{path} is not a file with records ({', '.join(well_known_endings(of_records=True))}), nor a pretokenized "
            f"directory"
            + (f": name a file in it, such as {inside}" if inside else "")
        )
    compiler = Compiler(tokenizer, options)
    for note in compiler.template.notes:
        print(f"note: {note}", file=sys.stderr)
    corpus = record_corpus(str(path.parent))
    for unit in plan_units(str(path.parent), [path.name], _UNIT_BYTES):
        for item in read_unit(corpus, unit):
            if isinstance(item, BadRecord):
                yield Shown(f"{item}: skipped", [], [])
                continue
            assert isinstance(item, Record)  # Documents come where the texts of records are wanted.
            where = place(item.path, item.counts, item.record)
            try:
                compiled = compiler.compile(compiler.parse(item.value))
            except ValueError as error:
                yield Shown(f"{where}: skipped, {error}", [], [])
                continue
            for sequences in compiled.samples:
                for side, one in enumerate(sequences):
                    name = f"{where}, {_SIDES[side]}" if len(sequences) > 1 else where
                    cut = f", {one.left_out} left out" if one.left_out else ""
                    yield Shown(name + cut, one.ids, one.supervised, _parts(one))
            if compiled.dropped:
                yield Shown(f"{where}: {compiled.dropped} dropped, too long: no answer is left", [], [])


def _parts(sample: TrainingSample) -> tuple[tuple[int, str], ...]:
    return tuple(
        (span.begin, f"message {span.message}, {sample.messages[span.message].role}'s "
         + ("header" if span.is_header else "text"))
        for span in sample.spans
    )  # fmt: skip


def sequences_of_directory(path: Path, split: str) -> Iterator[Shown]:
    """Sequences of a pretokenized directory.

    Raises:
        ValueError: see SequenceSet.
    """
    manifest = read_manifest(path)
    task = manifest.get("task", "pretrain")
    if task == "pretrain":
        raise ValueError(f"{path} was pretokenized for pretraining: look at it with `python -m dataset.inspect {path}`")
    sequences = SequenceSet(path, split, task, manifest.get("options", {}).get("max_seq_len", 0))
    yield from (_shown(sequences, number) for number in range(len(sequences)))


def _shown(sequences: SequenceSet, number: int) -> Shown:
    shard, inside = sequences.locate(number)
    ids, supervised = shard.sequence(inside)
    side = f", {_SIDES[number % 2]}" if shard.header.task == "dpo" else ""
    return Shown(place(*shard.origin(inside)) + side, ids.tolist(), supervised.astype(bool).tolist())


def sequences_at(run: TrainedOn, position: int) -> Iterator[Shown]:
    """Sequences that a run of SFT or DPO was trained on at a position of its stream.

    Raises:
        ValueError: the run has another task, or there is no such position.
    """
    dataset = open_dataset(kind_of(run.dirs["train"]), run.dirs["train"], "train", run.max_seq_len, packing=run.packing)
    if isinstance(dataset, PretrainDataset | MixtureDataset):
        raise ValueError("the run was pretrained: look at its samples with `python -m dataset.inspect`")
    sample = int(dataset.ids_at(run.seed, np.array(position)))
    yield from (_shown(dataset.sequences, number) for number in dataset.members(sample))


def _summary(shown: Shown) -> str:
    count = sum(shown.supervised)
    return f"{shown.title}: {len(shown.ids)} tokens, {count} supervised" if shown.ids else shown.title


def as_text(shown: Shown, tokenizer: Tokenizer, color: bool) -> Iterator[str]:
    """Lines that show a sequence in a terminal."""
    yield (f"{_DIM}--- {visible(_summary(shown))}{_RESET}" if color else f"--- {visible(_summary(shown))}")
    text, inside = "", False
    for piece in pieces(tokenizer, shown.ids, shown.supervised):
        if color:
            style = (_GREEN if piece.supervised else "") + (_BLUE if piece.is_control and not piece.supervised else "")
            # A style that crosses a line end would colour the rest of the screen's line.
            text += "\n".join(f"{style}{line}{_RESET}" if style else line for line in visible(piece.text).split("\n"))
        else:
            text += "⟦" if piece.supervised and not inside else "⟧" if inside and not piece.supervised else ""
            text += visible(piece.text)
            inside = piece.supervised
    if text:
        yield text + ("⟧" if inside else "")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Supervised tokens</title>
<style>
:root {{ color-scheme: light dark; --learnt: #b7f0c1; --ink: #17391f; --control: #1d5fbf; --line: #8885; }}
@media (prefers-color-scheme: dark) {{ :root {{ --learnt: #1f6b35; --ink: #eafff0; --control: #7fb4ff; }} }}
body {{ font: 14px/1.7 ui-monospace, monospace; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.2rem; }} h2 {{ font-size: .9rem; font-weight: normal; opacity: .7; margin: 1.6rem 0 .3rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: .6rem; border: 1px solid var(--line); }}
span {{ border-right: 1px solid var(--line); }}
.learnt {{ background: var(--learnt); color: var(--ink); }} .control {{ color: var(--control); font-weight: bold; }}
.learnt.control {{ color: var(--ink); }}
</style></head><body>
<h1>Which tokens are supervised: <span class="learnt">the green ones</span>.
Control tokens are <span class="control">bold</span>; point at a token for its id and message.</h1>
{body}
</body></html>
"""


def as_page(samples: Iterable[Shown], tokenizer: Tokenizer) -> str:
    parts = []
    for shown in samples:
        parts.append(f"<h2>{html.escape(visible(_summary(shown)))}</h2>")
        tokens, position, parts_left, belongs_to = [], 0, list(shown.parts), ""
        for piece in pieces(tokenizer, shown.ids, shown.supervised):
            while parts_left and parts_left[0][0] <= position:
                belongs_to = f", {parts_left.pop(0)[1]}"
            classes = " ".join(
                name for name, holds in (("learnt", piece.supervised), ("control", piece.is_control)) if holds
            )
            ids = ", ".join(map(str, piece.ids))
            text = html.escape(visible(piece.text)).replace("\n", "↵\n")
            tokens.append(f'<span class="{classes}" title="token {position}, id {ids}{belongs_to}">{text}</span>')
            position += len(piece.ids)
        if tokens:
            parts.append(f"<pre>{''.join(tokens)}</pre>")
    return _PAGE.format(body="\n".join(parts))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m dataset.show_mask", description="Show which tokens are supervised."
    )
    parser.add_argument("path", type=a_path, help="file with raw records, pretokenized directory, or run")
    parser.add_argument("--tokenizer_dir", type=a_path, help="default: the one in a pretokenized directory")
    add_compiling_arguments(parser)
    parser.add_argument("--split", choices=SPLITS, default="train", help="set of a pretokenized directory")
    parser.add_argument("--position", type=int, help="show what a run took from this position of its stream")
    parser.add_argument("--first", type=int, default=0, help="number of samples to pass over (default: 0)")
    parser.add_argument("--num", type=int, default=10, help="number of samples to show (default: 10)")
    parser.add_argument("--html", type=a_path, metavar="FILE", help="write a page with the same samples")
    parser.add_argument("--color", choices=["auto", "always", "never"], default="auto")
    args = parser.parse_args(argv)
    path = Path(args.path)
    run = None
    try:
        if not path.exists():
            raise ValueError(absent(path))
        if is_run(path):
            run = read_trained_on(path)
            path = run.dirs[args.split]
        if args.position is not None and run is None:
            raise ValueError(f"--position is for a run, and {path} is not one")
        if args.position is not None and args.split != "train":
            raise ValueError("--position is of the train set's stream: leave out --split")
        if args.first < 0:
            raise ValueError(f"--first must not be negative, got {args.first}")
        if args.num < 1:
            raise ValueError(f"--num must be positive, got {args.num}")
        is_directory = (path / MANIFEST_NAME).exists()
        if not is_directory and not args.tokenizer_dir:
            raise ValueError("raw records need --tokenizer_dir")
        tokenizer = load_tokenizer(args.tokenizer_dir or path / "tokenizer")
        if run is not None and args.position is not None:
            samples = sequences_at(run, args.position)
        elif is_directory:
            samples = sequences_of_directory(path, args.split)
        else:
            samples = records_of_file(path, tokenizer, compiler_options_from(args))
        chosen = list(islice(samples, args.first, args.first + args.num + 1))
        has_more, chosen = len(chosen) > args.num, chosen[: args.num]
        if args.html:
            atomic_write(Path(args.html), as_page(chosen, tokenizer).encode("utf-8", "replace"))
    except (ValueError, OSError) as error:
        print(f"show_mask: {error}", file=sys.stderr)
        return 2
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    for shown in chosen:
        print("\n".join(as_text(shown, tokenizer, color)))
    if has_more:
        print(f"show_mask: there are more than these {len(chosen)}: --num and --first show others", file=sys.stderr)
    if chosen and not any(shown.ids for shown in chosen):
        # The reason why a record was skipped names its task.
        needs_dpo = any(shown.title.endswith("for --task dpo") for shown in chosen)
        hint = "; records of pairs (chosen, rejected) need --task dpo" if needs_dpo else ""
        print(f"show_mask: nothing to show: every record was skipped or dropped{hint}", file=sys.stderr)
        return 2
    if args.html:
        print(f"written to {args.html}")
    return 0


if __name__ == "__main__":
    run_main(main)

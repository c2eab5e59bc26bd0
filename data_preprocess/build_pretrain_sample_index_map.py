"""Build the sample index of pretokenized data: from `.bin` shards to one `.ibin` a set (format: dataset/format.py).

python -m data_preprocess.build_pretrain_sample_index_map --data_dir O --max_seq_len 2048
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

from pathlib import Path

from dataset.format import (
    MANIFEST_NAME,
    PRETOKENIZE_COMMAND,
    SPLITS,
    index_path,
    read_document_table,
    read_index,
    read_manifest_of,
    require_pretokenized,
    write_index,
)
from utils.arguments import Parser
from utils.paths import a_path
from utils.terminal import run_main


def build(data_dir: Path, max_seq_len: int) -> list[str]:
    """Write the index of both sets and return a line about each.

    Raises:
        ValueError: the directory was not pretokenized, or a set is damaged or too small.
    """
    manifest_path = data_dir / MANIFEST_NAME
    if not manifest_path.exists():
        require_pretokenized(data_dir, max_seq_len)
        raise ValueError(f"{manifest_path} is missing: run `{PRETOKENIZE_COMMAND}` again")
    manifest = read_manifest_of(data_dir, PRETOKENIZE_COMMAND)
    shards, valid_ratio = manifest["shards"], manifest["valid_ratio"]
    lines = []
    for split in SPLITS:
        names = shards[split]
        if split == "valid" and not names and valid_ratio == 0:
            index_path(data_dir, split, max_seq_len).unlink(missing_ok=True)
            lines.append("valid: none (--valid_ratio was 0)")
            continue
        documents = sum(len(read_document_table(data_dir / name).starts) for name in names)
        write_index(data_dir, split, max_seq_len, names)
        samples = len(read_index(data_dir, split, max_seq_len).rows)
        lines.append(
            f"{split}: {samples:,} samples of {max_seq_len} tokens from {documents:,} documents "
            f"({samples * max_seq_len / documents:,.0f} tokens a document)"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m data_preprocess.build_pretrain_sample_index_map", description="Build the .ibin sample index."
    )
    parser.add_argument("--data_dir", type=a_path, required=True, help="directory with the .bin files")
    parser.add_argument("--max_seq_len", type=int, required=True, help="tokens of a sample")
    args = parser.parse_args(argv)
    try:
        for line in build(Path(args.data_dir), args.max_seq_len):
            print(line)
    except (ValueError, OSError) as error:
        print(f"build index: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_main(main, goes_on=True)

"""The files of a corpus: those that are read, and those that are left out, with the reason."""

import re
import sys
from pathlib import Path

from data_preprocess.readers.corpus import Corpus
from data_preprocess.readers.folders import files_below
from data_preprocess.readers.registry import is_readable
from dataset.format import MANIFEST_NAME, TOKEN_FILE_SUFFIXES

_OF_OTHER_KINDS = "files of other kinds"


def list_inputs(corpus: Corpus) -> tuple[list[str], dict[str, str]]:
    """Chosen files that can be read, as sorted paths relative to the root; and path -> reason for those left out.

    Hidden files and folders and the files that pretokenizing writes are passed over.

    Raises:
        OSError: a folder cannot be listed.
    """
    inputs: list[str] = []
    left_out: dict[str, str] = {}

    def is_chosen(path: str) -> bool:
        meant = corpus.fields is not None and corpus.names_kind_of(path)
        return corpus.chooses(path) and (meant or not _is_ours(path))

    for file in files_below(corpus.root, is_chosen, corpus.excludes):
        if file.problem:
            # The files behind a broken link cannot be known, so they may have been wanted.
            if not corpus.excludes(file.path):
                left_out[file.path] = file.problem
        elif is_readable(corpus, file.path):
            inputs.append(file.path)
        else:
            left_out[file.path] = _OF_OTHER_KINDS
    return inputs, left_out


def _is_ours(path: str) -> bool:
    """Whether a file is one that pretokenizing writes, by its name."""
    name = Path(path).name
    of_ours = name == MANIFEST_NAME or Path(name).suffix in TOKEN_FILE_SUFFIXES
    return of_ours or re.search(r"\.tmp-\d+$", name) is not None


def print_left_out(left_out: dict[str, str]) -> None:
    """Print a line for each reason why files were left out."""
    for reason in sorted(set(left_out.values())):
        paths = [path for path in left_out if left_out[path] == reason]
        if reason == _OF_OTHER_KINDS:
            names = ", ".join(sorted({Path(path).suffix or "no suffix" for path in paths}))
        else:
            names = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
        line = f"left out {len(paths)} {reason} ({names})"
        print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)

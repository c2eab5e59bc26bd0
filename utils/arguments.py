"""Flags of the commands: argparse, with one sentence if a command is wrong.

argparse itself prints the whole list of flags first, and answers an unknown flag at most by naming another one that is
missing.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

_VALUE = re.compile(r"[^-]|-$|-\.?\d|.*\s", re.DOTALL)
"""Beginning of a word that argparse takes for a value: not a dash, or a negative number, or a text with a blank."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, with a guess at the flag that was meant."""

    _has_commands = False

    def add_subparsers(self, **options: Any) -> Any:
        self._has_commands = True
        return super().add_subparsers(**options)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if not self._has_commands:
            # Before argparse says that --data_dir is missing where --data-dir was given.
            self._refuse_unknown(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"{' '.join(rest)!r} is left over: flags begin with --, and a value with blanks needs quotes")
        return found

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        """Refuse flags that this command does not have.

        Raises:
            SystemExit: one of the words is such a flag.
        """
        known = {flag.replace("-", "_"): flag for flag in self._option_string_actions}
        for word in words:
            if word == "--":
                return
            name = word.partition("=")[0]
            if not _VALUE.match(word) and not any(flag.startswith(name) for flag in known.values()):
                near = get_close_matches(name.lower().replace("-", "_"), known, 1)
                meant = f": did you mean {known[near[0]]}?" if near else ""
                self.error(f"{name} is not a flag of this command{meant}")

    def error(self, message: str) -> NoReturn:
        """End the command with a sentence.

        Raises:
            SystemExit: with code 2.
        """
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")

"""Addresses of runs and folders of runs, as users write them on the command line or in the window."""

import os
import re
from dataclasses import dataclass

from utils.paths import expand
from utils.ssh import SSHTarget
from utils.text import plain


@dataclass(frozen=True)
class RunAddress:
    """A place with one or several runs."""

    target: SSHTarget | None
    """None: this machine."""
    path: str

    @staticmethod
    def parse(text: str) -> "RunAddress":
        """The address that a text stands for: a local path, [user@]host:path, or ssh://[user@]host[:port]/path, where
        /~/ is the home directory.

        Raises:
            ValueError: the text is not an address; one sentence for the user.
        """
        if match := re.fullmatch(r"ssh://([^/]+)(/.*)?", text):
            path = match[2] or ""
            return RunAddress(SSHTarget.parse(match[1]), _remote(text, re.sub("^/(~|[$])", r"\1", path)))
        if text.startswith("ssh://"):
            raise ValueError(f"{plain(text)!r} names no host: write ssh://[user@]host[:port]/RUN")
        host, colon, path = text.partition(":")
        if match := re.fullmatch(r"((?:[^@/]+@)?\[[^]]*\]):(.*)", text):
            host, colon, path = match[1], ":", match[2]
        # As for scp, a colon after a slash, or in the name of a local file, does not end a host. C:\ is a drive.
        if not colon or "/" in host or re.match(r"[A-Za-z]:\\", text) or os.path.exists(text):
            return RunAddress(None, expand(text))
        if not host or re.fullmatch(r"\d{1,5}(/.*|:.*)", path):
            raise ValueError(f"{plain(text)!r} is not a run: write RUN, [user@]host:RUN or ssh://[user@]host:port/RUN")
        return RunAddress(SSHTarget.parse(host), _remote(text, path))


def _remote(text: str, path: str) -> str:
    """A path on another machine, for SFTP. Relative paths begin at the home directory; nothing else is expanded.

    Raises:
        ValueError: the path holds something that only a shell would expand.
    """
    path = re.sub("^~(/|$)", "", path) or "."
    if match := re.match(r"~[^/]*|.*?(\$[A-Za-z_{][A-Za-z0-9_}]*)", path.replace("$$", "")):
        raise ValueError(
            f"{plain(text)!r}: {plain(match[1] or match[0])} means something there only to a shell: write the path in "
            f"full, or from your home directory on"
        )
    return path.replace("$$", "$")

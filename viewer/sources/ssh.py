"""Files on another machine, by SFTP over one SSH connection."""

import logging
import math
import stat
import time
from typing import TYPE_CHECKING, Protocol

from utils.ssh import SSHTarget, connect
from viewer.sources.files import FileState, is_of_one_file

if TYPE_CHECKING:
    import paramiko

logger = logging.getLogger(__name__)


class Questions(Protocol):
    """Somebody who answers when a host asks; called from the source's thread."""

    def confirm(self, name: str, key_type: str, fingerprint: str) -> bool: ...
    def password(self, prompt: str) -> str | None: ...


class RememberedAnswers:
    """Gives the same answers again, each once an attempt, so that nobody is asked again after a lost connection."""

    def __init__(self, questions: Questions):
        self._questions = questions
        self._answers: dict[str, str] = {}
        self._used: set[str] = set()

    def begin(self) -> None:
        """Begin another attempt to connect."""
        self._used.clear()

    def forget(self) -> None:
        """Forget answers that were wrong: they must not be tried again."""
        self._answers.clear()

    def confirm(self, name: str, key_type: str, fingerprint: str) -> bool:
        return self._questions.confirm(name, key_type, fingerprint)

    def password(self, prompt: str) -> str | None:
        if prompt in self._answers and prompt not in self._used:
            self._used.add(prompt)
            return self._answers[prompt]
        answer = self._questions.password(prompt)
        if answer:
            self._answers[prompt] = answer
            self._used.add(prompt)
        return answer


def open_remote(target: SSHTarget, answers: RememberedAnswers | None, ssh_config: str | None) -> "RemoteFiles":
    """Connect to a machine.

    Args:
        answers: None: nobody is there to answer.
        ssh_config: used instead of ~/.ssh/config.
    Raises:
        HostKeyRefused, LoginRefused: another attempt would end the same way.
        OSError, EOFError, SSHException: the machine cannot be reached now.
    """
    confirm = password = None
    if answers is not None:
        answers.begin()
        confirm, password = answers.confirm, answers.password
    client = connect(target, confirm, password, config_file=ssh_config)
    try:
        return RemoteFiles(client)
    except BaseException:
        client.close()
        raise


class RemoteFiles:
    """Answers to `Files` over SFTP."""

    def __init__(self, client: "paramiko.SSHClient"):
        self._client = client
        self._sftp = client.open_sftp()
        self._sftp.get_channel().settimeout(20.0)
        self._request, self._sftp._request = self._sftp._request, self._lenient_request
        self._ahead = self._clock_ahead()

    def _lenient_request(self, *args) -> tuple:
        """paramiko cannot list a folder in which a single name is not UTF-8."""
        kind, message = self._request(*args)
        message.get_text = lambda: message.get_string().decode("utf-8", "replace")
        return kind, message

    def _clock_ahead(self) -> float:
        """Seconds by which the host's clock is ahead of ours; 0 if the host only serves files."""
        try:
            _, output, _ = self._client.exec_command("date +%s", timeout=5.0)
            ahead = float(output.read(32)) - time.time()
            return ahead if math.isfinite(ahead) else 0.0
        except Exception as error:
            # This does not matter, and each host that only serves files refuses in its own way.
            logger.debug("the host does not tell the time: %s", error)
            return 0.0

    def state(self, path: str) -> FileState | None:
        try:
            found = self._sftp.stat(path)
        except FileNotFoundError:
            return None
        regular = found.st_mode is None or stat.S_ISREG(found.st_mode)
        return FileState(found.st_size or 0, float(found.st_mtime or 0)) if regular else None

    def read(self, path: str, offset: int, size: int) -> bytes:
        with self._sftp.open(path, "rb") as file:
            file.seek(offset)
            # Ask for all bytes at once: otherwise each 32 KiB would cost a round trip.
            file.prefetch(offset + size)
            return file.read(size)

    def folders(self, path: str) -> list[str]:
        try:
            entries = self._sftp.listdir_attr(path)
        except OSError as error:
            if not is_of_one_file(error, self):
                raise
            return []
        # A link may lead to a folder.
        return sorted(e.filename for e in entries if stat.S_IFMT(e.st_mode or 0) in (stat.S_IFDIR, stat.S_IFLNK))

    def now(self) -> float:
        return time.time() + self._ahead

    def connected(self) -> bool:
        transport = self._client.get_transport()
        return transport is not None and transport.is_active() and not self._sftp.get_channel().closed

    def close(self) -> None:
        self._client.close()

"""A conversation in the terminal: questions and commands are read, answers appear as they are drawn.

A line that ends in a backslash goes on in the next one. A text of several lines stands between lines of three quotes;
where the terminal marks pasted text, a paste of several lines is one question anyway.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from serving.arguments import NO_ADAPTER
from serving.chat import Chat, notes_on
from serving.local import BrokenOff
from utils.paths import expand

if TYPE_CHECKING:
    from serving.loading import Speech

_QUOTES = '"""'
_HELP = """\
/reset           forget what was said
/regenerate      answer the last question once more
/system TEXT     tell the model this first; "none" takes it away
/adapter NAME    go on with another adapter; "none" with none
/save FILE       write the conversation as a .jsonl file, which SFT can learn from
/help            say this
/exit or Ctrl-D  end; Ctrl-C ends an answer
A line that ends in \\ goes on in the next. A text of several lines stands between lines of three quotes (\"\"\")."""
_LEAVING = ("/exit", "/quit", "exit", "quit")
"""To leave, nobody should have to look up the command."""


class Speakers(Protocol):
    """The adapters among which a conversation may choose; see serving/loading.py."""

    @property
    def names(self) -> list[str]: ...

    def speech_of(self, name: str | None) -> "Speech": ...


def tell(text: str) -> None:
    """Write to standard error: standard output is for the model's text alone."""
    print(f"generate: {text}", file=sys.stderr)


def questions(is_interactive: bool) -> Iterator[str]:
    """Texts that the user enters, without outer blanks, until the input ends."""
    read = input
    if is_interactive:
        _edit_lines()
    while True:
        lines: list[str] = []
        try:
            line = read("> " if is_interactive else "")
            if line.strip() == _QUOTES:
                while (line := read(". " if is_interactive else "")).strip() != _QUOTES:
                    lines.append(line)
            else:
                while line.endswith("\\"):
                    lines.append(line[:-1])
                    line = read(". " if is_interactive else "")
                lines.append(line)
        except (EOFError, KeyboardInterrupt):
            if text := "\n".join(lines).strip():
                yield text
            return
        if text := "\n".join(lines).strip():
            yield text


def _edit_lines() -> None:
    """Let `input` edit lines, remember earlier ones, and take a paste of several lines as one text."""
    with suppress(ImportError):
        import readline

        # Python turns it off, because it reads programs line by line.
        readline.parse_and_bind("set enable-bracketed-paste on")


class Talk:
    """A conversation with its commands."""

    def __init__(self, chat: Chat, speakers: Speakers):
        self._chat, self._speakers = chat, speakers
        self._is_interactive = sys.stdin.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": lambda _: chat.reset(), "/regenerate": lambda _: self._regenerate(), "/system": self._tell_first,
            "/adapter": self._use, "/save": self._save, "/help": lambda _: print(_HELP, file=sys.stderr),
        }  # fmt: skip

    def hold(self) -> None:
        """Talk until the input ends."""
        if self._is_interactive:
            print("/help lists the commands, /exit or Ctrl-D ends, Ctrl-C ends an answer", file=sys.stderr)
        for text in questions(self._is_interactive):
            if text.lower() in _LEAVING:
                return
            word, _, rest = text.partition(" ")
            if command := self._commands.get(word):
                try:
                    command(rest.strip())
                except (ValueError, OSError) as error:
                    tell(str(error))
            elif word.startswith("/") and word[1:].isalpha():
                tell(f"{word} is not a command: /help lists them")
            else:
                self._say(lambda text=text: self._chat.answer(text))

    def _say(self, answer: Callable[[], Iterator[str]]) -> None:
        """Print an answer, or why there is none.

        Raises:
            BrokenOff: no further question can be answered.
        """
        said, forgotten = True, self._chat.forgotten
        try:
            for piece in answer():
                print(piece, end="", flush=True)
        except BrokenOff:
            print(flush=True)
            raise
        except KeyboardInterrupt:
            pass
        except ValueError as error:
            tell(str(error))
            said = False
        if said:
            print(flush=True)
        if self._chat.forgotten > forgotten:
            tell(f"the conversation is longer than the model's context: it no longer sees the first "
                 f"{self._chat.forgotten} messages")  # fmt: skip
        if said and self._chat.was_cut and self._is_interactive:
            tell(f"the answer was cut at --max_new_tokens={self._chat.sampling.max_new_tokens}")

    def _regenerate(self) -> None:
        self._say(self._chat.again)

    def _tell_first(self, text: str) -> None:
        if text:
            self._chat.system = "" if text == "none" else text
        tell(f"the model is told first: {self._chat.system or '(nothing)'}")

    def _use(self, name: str) -> None:
        """Go on with another adapter. What was said stays."""
        names = self._speakers.names
        if not names:
            raise ValueError("no adapter is loaded: give some with --adapter at the start")
        known = [*names, NO_ADAPTER]
        if not name:
            tell(f"in use is {self._chat.adapter or 'no adapter'}, of {', '.join(known)}: /adapter NAME")
            return
        adapter = None if name == NO_ADAPTER else name
        speech = self._speakers.speech_of(adapter)
        self._chat.speak_by(adapter, speech.tokenizer)
        tell(f"goes on with {f'the adapter {adapter}' if adapter else 'no adapter'}")
        for note in notes_on(speech.tokenizer, speech.stop_ids):
            tell(note)

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save needs the name of a file")
        path = Path(expand(name))
        path = path if path.suffix == ".jsonl" else path.with_name(f"{path.name}.jsonl")
        count = self._chat.save(path)
        first = ", the system text among them," if self._chat.system else ""
        tell(f"{count} messages{first} are in {path}, for --task_type=sft")

"""Features of a chat template, found out by giving it small conversations."""

from collections.abc import Sequence
from functools import cached_property

from tokenizer.jinja_template import JinjaTemplate

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names that templates use for thoughts which stand apart from an answer's text."""


class Features:
    """Features of one template. Each is found out when it is first needed."""

    def __init__(self, jinja: JinjaTemplate):
        self._jinja = jinja

    @cached_property
    def joins_arguments(self) -> bool:
        """Whether it takes the arguments of a call as JSON text, as OpenAI does, instead of a dictionary."""

        def works(arguments: object) -> bool:
            return "one" in self._tried(_calling(arguments))

        return not works({"one": 1}) and works('{"one": 1}')

    @cached_property
    def quotes_results(self) -> bool:
        """Whether it writes the results of tools as JSON, as Llama 3.1's does."""
        messages = _calling('{"one": 1}' if self.joins_arguments else {"one": 1})
        result = {"role": "tool", "content": 'a"b', "name": "f", "tool_call_id": "call00001"}
        return 'a\\"b' in self._tried([*messages, result])

    @cached_property
    def reasoning_key(self) -> str:
        """Name that it uses for thoughts which stand apart from the text; empty if it shows none."""
        shown = (key for key in REASONING_KEYS if self._keeps({"content": "\ufdd20\ufdd3", key: "\ufdd21\ufdd3"}))
        return next(shown, "")

    @cached_property
    def keeps_thoughts(self) -> bool:
        """Whether it keeps thoughts that stand within the text of the last answer."""
        return self._keeps({"content": "<think>\n\ufdd20\ufdd3\n</think>\n\n\ufdd21\ufdd3"})

    def _keeps(self, answer: dict[str, str]) -> bool:
        """Whether it writes both placeholders of a last answer."""
        text = self._tried([{"role": "user", "content": "What?"}, {"role": "assistant", **answer}])
        return text.count("\ufdd20\ufdd3") == 1 and text.count("\ufdd21\ufdd3") == 1

    def _tried(self, messages: Sequence[dict]) -> str:
        return tried(self._jinja, messages)


def tried(jinja: JinjaTemplate, messages: Sequence[dict]) -> str:
    """Output of a template; empty where it refuses."""
    try:
        return jinja.render(messages)
    except ValueError:
        return ""


def _calling(arguments: object) -> list[dict]:
    """Messages of a question whose answer is a call, to see how a template writes it."""
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]

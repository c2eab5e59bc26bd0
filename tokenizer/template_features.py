"""Features of a chat template, found out by giving it small conversations."""

from collections.abc import Sequence
from functools import cached_property

from tokenizer.jinja_template import JinjaTemplate

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""What templates call the thoughts that stand apart from an answer's text."""


class Features:
    """Features of one template, each found out when it is first asked for."""

    def __init__(self, jinja: JinjaTemplate):
        self._jinja = jinja

    @cached_property
    def joins_arguments(self) -> bool:
        """Whether it takes the arguments of a call as a text of JSON, as OpenAI does, instead of as a dictionary."""

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
        """What the template calls thoughts that stand apart from the text; empty if it shows none."""
        shown = (key for key in REASONING_KEYS if self._keeps({"content": "\ufdd20\ufdd3", key: "\ufdd21\ufdd3"}))
        return next(shown, "")

    @cached_property
    def keeps_thoughts(self) -> bool:
        """Whether it leaves thoughts within the text in the last answer."""
        return self._keeps({"content": "<think>\n\ufdd20\ufdd3\n</think>\n\n\ufdd21\ufdd3"})

    def _keeps(self, answer: dict[str, str]) -> bool:
        """Whether both placeholders of a last answer are in what it writes."""
        text = self._tried([{"role": "user", "content": "What?"}, {"role": "assistant", **answer}])
        return text.count("\ufdd20\ufdd3") == 1 and text.count("\ufdd21\ufdd3") == 1

    def _tried(self, messages: Sequence[dict]) -> str:
        return tried(self._jinja, messages)


def tried(jinja: JinjaTemplate, messages: Sequence[dict]) -> str:
    """What a template writes; nothing where it refuses."""
    try:
        return jinja.render(messages)
    except ValueError:
        return ""


def _calling(arguments: object) -> list[dict]:
    """A question whose answer is a call, to see what a template makes of it."""
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]

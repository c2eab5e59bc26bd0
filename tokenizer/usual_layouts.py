"""Usual layouts of conversations, known by their control tokens, each as a program in Jinja."""

from collections.abc import Mapping
from typing import NamedTuple

from tokenizer.base import MESSAGE_END, MESSAGE_SEPARATOR, MESSAGE_START

JINJA = (
    "{% for message in messages %}"
    f"{{{{ '{MESSAGE_START}' + message['role'] + '{MESSAGE_SEPARATOR}' + message['content'] + '{MESSAGE_END}' }}}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    f"{{{{ '{MESSAGE_START}assistant{MESSAGE_SEPARATOR}' }}}}"
    "{% endif %}"
)
"""Layout of the tokenizers trained here, for transformers' `apply_chat_template` and for us."""
_CHATML = (
    "{% for message in messages %}"
    f"{{{{ '{MESSAGE_START}' + message['role'] + '\\n' + message['content'] + '{MESSAGE_END}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{MESSAGE_START}assistant\\n' }}}}{{% endif %}}"
)
_LLAMA3_FIRST = "<|begin_of_text|>"
_LLAMA3 = (
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


class UsualLayout(NamedTuple):
    """A layout, and the control tokens by which it is known."""

    name: str
    tokens: tuple[str, ...]
    template: str
    first: str = ""
    """Control token that begins a conversation where the tokenizer has it."""


_USUAL = (
    UsualLayout("zero2all's", (MESSAGE_START, MESSAGE_SEPARATOR, MESSAGE_END), JINJA),
    UsualLayout("ChatML's", (MESSAGE_START, MESSAGE_END), _CHATML),
    UsualLayout("Llama 3's", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), _LLAMA3, _LLAMA3_FIRST),
)


def usual_layout(special_ids: Mapping[str, int]) -> UsualLayout:
    """Usual layout for a tokenizer without a chat template.

    Raises:
        ValueError: its control tokens are not those of a known layout.
    """
    usual = next((one for one in _USUAL if special_ids.keys() >= set(one.tokens)), None)
    if usual is None:
        raise ValueError(
            f"the tokenizer has no chat template, and no control tokens for conversations, such as {MESSAGE_START} "
            f"and {MESSAGE_END}: put a chat_template.jinja into its folder, or use a tokenizer that was trained "
            f"with `python -m tokenizer.train_tokenizer`"
        )
    return usual

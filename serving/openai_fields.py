"""Fields of OpenAI's API, with some of vLLM's additions.

Each table names the fields that count. Fields that OpenAI documents and this server does not have stand in a second
table, with the values at which they mean nothing. All others are unknown. Both kinds are refused by name.
"""

from typing import Any

from serving.answers import DRAWING_FIELDS, LOCAL_FIELDS, MOST_ALTERNATIVES
from serving.fields import Field, Mistake, boolean, take, text, whole
from tokenizer.chat_template import Message

_LARGEST = 1 << 24
_OPTIONS = {"include_usage": Field(boolean, False)}
_SHARED: dict[str, Field] = {
    "model": Field(text),
    "stream": Field(boolean, False),
    "stream_options": Field(lambda value: stream_options(value)),
    "max_tokens": Field(whole(0, _LARGEST)),
    # Tells OpenAI who asks; nothing here depends on it.
    "user": Field(text),
    **DRAWING_FIELDS,
    **LOCAL_FIELDS,
}
CHAT_FIELDS: dict[str, Field] = _SHARED | {
    "messages": Field(lambda value: messages(value)),
    "max_tokens": Field(whole(1, _LARGEST)),
    "max_completion_tokens": Field(whole(1, _LARGEST)),
    "logprobs": Field(boolean, False),
    "top_logprobs": Field(whole(0, MOST_ALTERNATIVES)),
    "show_prompt": Field(boolean, False),
}
COMPLETION_FIELDS: dict[str, Field] = _SHARED | {
    "prompt": Field(lambda value: value),
    "logprobs": Field(whole(0, MOST_ALTERNATIVES)),
    "echo": Field(boolean, False),
    "best_of": Field(whole(1, 1024)),
    "add_special_tokens": Field(boolean, True),
}
_FORMATS = ({"type": "text"},)
CHAT_OFF: dict[str, tuple] = {
    "audio": (), "function_call": ("none",), "functions": ([],), "metadata": ({},), "modalities": (["text"],),
    "moderation": (), "parallel_tool_calls": (True, False), "prediction": (), "prompt_cache_key": (),
    "prompt_cache_options": (), "prompt_cache_retention": (), "reasoning_effort": ("none",),
    "response_format": _FORMATS, "safety_identifier": (), "service_tier": ("auto", "default"), "store": (False,),
    "tool_choice": ("none", "auto"), "tools": ([],), "verbosity": ("medium",), "web_search_options": (),
    # vLLM's.
    "add_generation_prompt": (True,), "continue_final_message": (False,), "add_special_tokens": (False,),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "echo": (False,),
    "chat_template": (), "chat_template_kwargs": ({},), "documents": ([],), "use_beam_search": (False,),
    "best_of": (1,), "truncate_prompt_tokens": (), "priority": (0,),
}  # fmt: skip
COMPLETION_OFF: dict[str, tuple] = {
    "suffix": ("",), "response_format": _FORMATS, "max_completion_tokens": (), "messages": (),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "use_beam_search": (False,),
    "truncate_prompt_tokens": (), "priority": (0,),
}  # fmt: skip
_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
_MESSAGE_FIELDS = {
    "role": Field(text), "content": Field(lambda value: content(value)), "name": Field(text),
}  # fmt: skip
_MESSAGE_OFF: dict[str, tuple] = {
    "tool_calls": ([],), "tool_call_id": (), "function_call": (), "refusal": ("",), "audio": (), "annotations": ([],),
    "reasoning_content": ("",), "reasoning": ("",),
}  # fmt: skip


def stream_options(value: Any) -> dict:
    """An object with include_usage."""
    if not isinstance(value, dict):
        raise ValueError("an object")
    return take(value, _OPTIONS, {"include_obfuscation": (False,)}, "stream_options.")


def messages(value: Any) -> list[Message]:
    """The messages of a conversation."""
    if not isinstance(value, list) or not value:
        raise ValueError("a list of at least one message")
    found = []
    for number, one in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(one, dict):
            raise Mistake(f"{where} must be an object with role and content", where, "invalid_value")
        if one.get("role") in ("tool", "function"):
            raise Mistake(f"{where}.role is {one['role']}, and tools are not supported by this server", f"{where}.role",
                          "unsupported_parameter")  # fmt: skip
        values = take(one, _MESSAGE_FIELDS, _MESSAGE_OFF, f"{where}.")
        if values["role"] not in _ROLES:
            raise Mistake(f"{where}.role must be one of {', '.join(_ROLES)}", f"{where}.role", "invalid_value")
        if values["content"] is None:
            raise Mistake(f"{where}.content is missing: give a text", f"{where}.content", "missing_parameter")
        found.append(Message(_ROLES[values["role"]], values["content"], name=values["name"] or ""))
    return found


def content(value: Any) -> str:
    """A text, or parts of one."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("a text, or a list of parts of the type text")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) - {"type", "text"}:
            raise ValueError('a text, or a list of parts like {"type": "text", "text": "..."}: pictures and sounds are '
                             "not supported by this server")  # fmt: skip
        if not isinstance(part.get("text"), str):
            raise ValueError('a list of parts, each with its "text"')
    return "".join(part["text"] for part in value)


def prompts_of(value: Any, most: int) -> list[str | list[int]]:
    """The prompts in one of the four forms: a text, texts, token ids, lists of token ids.

    Raises:
        Mistake: it is none of them, or too many.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(one) is int for one in value):
            return [value]
        is_texts = all(isinstance(one, str) for one in value)
        if is_texts or all(isinstance(one, list) and all(type(id_) is int for id_ in one) for one in value):
            if len(value) > most:
                raise Mistake(f"a request may have {most} prompts at most, got {len(value)}", "prompt")
            return value
    raise Mistake("prompt must be a text, a list of texts, a list of token ids, or a list of such lists", "prompt",
                  "invalid_value")  # fmt: skip


TOKENIZE_FIELDS: dict[str, Field] = {
    "model": Field(text), "prompt": Field(text), "messages": Field(messages),
    "add_special_tokens": Field(boolean, True), "return_token_strs": Field(boolean, False),
    "show_prompt": Field(boolean, False),
}  # fmt: skip
TOKENIZE_OFF: dict[str, tuple] = {
    "add_generation_prompt": (True,), "continue_final_message": (False,), "chat_template": (),
    "chat_template_kwargs": ({},), "tools": ([],),
}  # fmt: skip
DETOKENIZE_FIELDS: dict[str, Field] = {"model": Field(text), "tokens": Field(lambda value: value)}

"""Roles: our names of them, and the names that data sets use."""

from collections.abc import Mapping

from data_preprocess.conversations.fields import quoted

CALLS = "calls"
"""Role of a message whose text is a call, as JSON."""

DEFAULT_ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "ask": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "ans": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "function_response": "tool",
    "function_call": CALLS,
    "tool_call": CALLS,
}
"""Name of a role in data sets -> our name."""


def roles_with(user_name: str = "", assistant_name: str = "") -> dict[str, str]:
    """DEFAULT_ROLES with a data set's own names."""
    own = {name: role for name, role in ((user_name, "user"), (assistant_name, "assistant")) if name}
    return {**DEFAULT_ROLES, **own}


def role_of(name: object, where: str, roles: Mapping[str, str]) -> str:
    """Our name of a role.

    Args:
        where: name of the message in the sentence.
    Raises:
        ValueError: the role is unknown.
    """
    # A data set's own names are matched as they are written; the usual ones in upper and lower case.
    if isinstance(name, dict | list):
        raise ValueError(f"{where} has a role that is not text")
    role = roles.get(name) or roles.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        advice = ": say whose it is with --user_name or --assistant_name" if isinstance(name, str) and name else ""
        raise ValueError(f"{where} has the unknown role {quoted(name)}{advice}")
    return role

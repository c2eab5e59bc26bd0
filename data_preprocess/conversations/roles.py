"""Roles: the names that data sets give them, and ours."""

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
"""What datasets call the roles -> what we call them."""


def roles_with(user_name: str = "", assistant_name: str = "") -> dict[str, str]:
    """DEFAULT_ROLES and a dataset's own names."""
    own = {name: role for name, role in ((user_name, "user"), (assistant_name, "assistant")) if name}
    return {**DEFAULT_ROLES, **own}


def role_of(name: object, where: str, roles: Mapping[str, str]) -> str:
    """Our name of a role.

    Raises:
        ValueError: it is unknown; `where` stands in the sentence.
    """
    # A dataset's own names are told as they are written; the usual ones in any case.
    if isinstance(name, dict | list):
        raise ValueError(f"{where} has a role that is no text")
    role = roles.get(name) or roles.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        advice = ": say whose it is with --user_name or --assistant_name" if isinstance(name, str) and name else ""
        raise ValueError(f"{where} has the unknown role {quoted(name)}{advice}")
    return role

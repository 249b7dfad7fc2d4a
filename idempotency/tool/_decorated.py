"""What a decorated function is asked for: its approvals, and what an adapter wants to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from idempotency.errors import ConfigurationError
from idempotency.tool._approval import Approvals

_ATTRIBUTE = "_idempotent_tool"


@dataclass(frozen=True, slots=True)
class Decorated:
    """What a decorated function says of itself."""

    approvals: Approvals
    repeats_have_no_effect: bool


def mark(wrapper: Any, decorated: Decorated) -> None:
    """Let a wrapper say what it is."""
    setattr(wrapper, _ATTRIBUTE, decorated)


def is_idempotent_tool(function: object) -> bool:
    """Return whether :func:`idempotent_tool` decorated a function, or a method of an object."""
    return isinstance(getattr(function, _ATTRIBUTE, None), Decorated)


def repeats_have_no_effect(tool: Callable[..., Any]) -> bool:
    """Return whether a call with the same arguments has no more effect, whatever its caller sends, within the ttl.

    That is so for a tool with ``intent=``, unless it runs again after a crash. Adapters announce it to clients.
    Raises :class:`~idempotency.errors.ConfigurationError` for a function that is no idempotent tool.
    """
    return _decorated(tool).repeats_have_no_effect


async def approve(tool: Callable[..., Any], arguments: Mapping[str, Any], *, by: str) -> None:
    """Approve one call of a tool with exactly these arguments, as a person or a rule decided.

    ``tool``: a function that :func:`idempotent_tool` decorated with ``approval=``. ``arguments``: by name, those that
    were shown to the person who decided. ``by``: who decided; it is recorded.
    The approval is for one call: that of the same identity. Where an adapter gives the identity, approve inside of a
    ``tool_call`` with the same names. It can be used as long as ``Policy.ttl``.
    Raises :class:`~idempotency.errors.ConfigurationError` for a function that is no such tool, and
    :class:`~idempotency.errors.StoreError`.
    """
    await _decorated(tool).approvals.approve(arguments, by)


def approve_sync(tool: Callable[..., Any], arguments: Mapping[str, Any], *, by: str) -> None:
    """Approve a call without awaiting; see :func:`approve`."""
    _decorated(tool).approvals.approve_sync(arguments, by)


def _decorated(tool: object) -> Decorated:
    decorated = getattr(tool, _ATTRIBUTE, None)
    if not isinstance(decorated, Decorated):
        raise ConfigurationError(f"{tool!r} is no function that idempotent_tool decorated")
    return decorated

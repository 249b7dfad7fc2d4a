"""The identity of a call, and what its repeats must have in common with it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from inspect import Signature
from typing import Any

from idempotency._engine.calls import Calls
from idempotency._hooks import check_callable
from idempotency._rules import Claim
from idempotency._signature import close_unused
from idempotency.errors import ConfigurationError, KeyMissingError
from idempotency.tool._call import ToolCall
from idempotency.tool._data import NoDataError, canonical_text

Intent = Collection[str] | Callable[..., str | None] | None


class Identity:
    """What makes the claims of one tool from its arguments, and from what the framework says of a call."""

    def __init__(self, calls: Calls, signature: Signature, intent: Intent, ignore: Collection[str]) -> None:
        self._calls = calls
        self._signature = signature
        self._intent = intent
        self._ignore = frozenset(_names("ignore", ignore, signature))
        if callable(intent):
            check_callable("intent=", intent)
        elif intent is not None and not _names("intent", intent, signature):
            raise ConfigurationError("intent must name an argument: without any, all calls would be one")

    def claim(self, call: ToolCall, args: Any, kwargs: Any) -> Claim:
        """Make the claim of one call: its key is the identity, and its fingerprint all arguments.

        Raises :class:`~idempotency.errors.KeyMissingError` where nothing identifies the call, and
        :class:`~idempotency.errors.ConfigurationError` for an argument that is not data.
        """
        arguments = self._arguments(args, kwargs)
        compared = self._text({name: each for name, each in arguments.items() if name not in self._ignore})
        found = {**self._found(call, arguments, args, kwargs), "caller": call.caller, "occurrence": call.occurrence}
        return self._calls.claim(self._text({name: each for name, each in found.items() if each}), compared)

    def _found(self, call: ToolCall, arguments: dict[str, Any], args: Any, kwargs: Any) -> dict[str, Any]:
        if call.caller_key is not None:
            return {"key": call.caller_key}
        meant = self._meant(arguments, args, kwargs)
        if meant is not None:
            return {"intent": meant}
        if call.attempt is not None:
            call.by_attempt = True
            return {"attempt": call.attempt}
        raise KeyMissingError(
            f"{self._calls.name} was called, and nothing says which call it is: name the arguments that say what is "
            "meant, with intent=, or use an adapter, which gives the key of the caller or the id of the call (tool_call"
            "); a key is never invented"
        )

    def _meant(self, arguments: dict[str, Any], args: Any, kwargs: Any) -> Any:
        if self._intent is None:
            return None
        if callable(self._intent):
            meant = self._intent(*args, **kwargs)
            if meant is not None and not isinstance(meant, str):
                close_unused(meant)
                raise ConfigurationError(f"intent= must return text, not {type(meant).__name__}")
            return meant or None
        named = {name: arguments[name] for name in self._intent}
        return None if all(each is None for each in named.values()) else named

    def _arguments(self, args: Any, kwargs: Any) -> dict[str, Any]:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def _text(self, values: dict[str, Any]) -> str:
        try:
            return canonical_text(values)
        except NoDataError as error:
            raise ConfigurationError(
                f"{self._calls.name} was called with {error}, by which calls cannot be compared: name that argument in "
                "ignore="
            ) from error


def _names(option: str, names: object, signature: Signature) -> list[str]:
    """Return the names of arguments in an option; ConfigurationError for one that the function does not have."""
    if isinstance(names, str) or not isinstance(names, Collection):
        raise ConfigurationError(f"{option} must be names of arguments, such as ({names!r},)")
    for name in names:
        if name not in signature.parameters:
            raise ConfigurationError(f"{option} names {name!r}, and the function has no such argument")
    return list(names)

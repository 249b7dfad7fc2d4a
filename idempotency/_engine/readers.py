"""The functions that read a message or call: ``key=`` reads its key, ``fingerprint=`` what its repeats must share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from idempotency._hooks import check_callable, is_coroutine_function
from idempotency.errors import ConfigurationError

T = TypeVar("T")

Fingerprint = Callable[..., bytes | str] | Literal["body"] | None
"""What repeats must have in common with the first: what a function returns, the body, or nothing."""


def compared_by(
    fingerprint: Callable[..., T] | Literal["body"] | None, body: Callable[[], bytes | None], *args: Any, **kwargs: Any
) -> T | bytes | None:
    """Return what is compared of one message or call; ``body`` is called only where it is needed."""
    if fingerprint is None:
        return None
    if fingerprint == "body":
        return body()
    value = fingerprint(*args, **kwargs)
    if value is None:
        raise ConfigurationError("fingerprint= must return text or bytes, not None")
    return value


def check_readers(key: Any, fingerprint: Any, *, body: bool = True, awaited: bool = False) -> None:
    """Refuse a ``key`` or ``fingerprint`` that cannot read any message or call.

    ``body``: whether ``"body"`` is allowed. ``awaited``: whether coroutine functions are awaited.
    """
    readers = {"key": key, "fingerprint": None if body and fingerprint == "body" else fingerprint}
    for name, given in readers.items():
        plain = inspect.unwrap(given)
        if given is not None and not (awaited and is_coroutine_function(plain)):
            check_callable(f"{name}=", plain)

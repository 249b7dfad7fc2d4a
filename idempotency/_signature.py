"""Inspection of functions: whether they are awaited, their names, and whether they take a session."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar, get_type_hints
from weakref import WeakKeyDictionary

from idempotency._hooks import is_coroutine_function
from idempotency.errors import ConfigurationError

R = TypeVar("R")


def close_unused(value: object) -> None:
    """Close an awaitable or a generator that is not used, so that Python does not warn of it."""
    if inspect.isawaitable(value) or inspect.isgenerator(value) or inspect.isasyncgen(value):
        close = getattr(value, "close", None)
        if close is not None:
            close()


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether a call of ``function`` is awaited; ConfigurationError for a generator, which has many results."""
    if is_coroutine_function(function):
        return True
    for each in (function, getattr(type(function), "__call__", None)):  # noqa: B004
        plain = inspect.unwrap(each) if each is not None else None
        if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
            raise ConfigurationError(f"{name_of(function)} is a generator: what it yields cannot be recorded")
        if inspect.iscoroutinefunction(plain):
            return True
    return False


def name_of(function: Callable[..., Any]) -> str:
    """Return the name by which events mention a function."""
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


def once_per_function(compute: Callable[[Callable[..., Any]], R]) -> Callable[[Callable[..., Any]], R]:
    """Remember what ``compute`` returns for a plain function, as long as that is there."""
    known: WeakKeyDictionary[Callable[..., Any], R] = WeakKeyDictionary()

    @functools.wraps(compute)
    def remembered(function: Callable[..., Any]) -> R:
        if not inspect.isfunction(function):
            return compute(function)
        if function not in known:
            known[function] = compute(function)
        return known[function]

    return remembered


@once_per_function
def takes_session(function: Callable[..., Any]) -> bool:
    """Return whether a function is given the session as its keyword ``session``."""
    parameter = inspect.signature(function).parameters.get("session")
    return parameter is not None and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)


def needs_session(function: Callable[..., Any]) -> bool:
    """Return whether a function cannot be called without the keyword ``session``."""
    return takes_session(function) and (
        inspect.signature(function).parameters["session"].default is inspect.Parameter.empty
    )


def signature_without_session(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature that callers see: frameworks pass the arguments that they find in it.

    Annotations that are texts are evaluated, as far as they can be: a framework would look their names up in the module
    of the decorator. That of the session often cannot, because it is imported for type checkers only.
    """
    signature = inspect.signature(function)
    known = getattr(inspect.unwrap(function), "__globals__", {})
    others = [
        parameter.replace(annotation=_evaluated(parameter.annotation, known))
        for name, parameter in signature.parameters.items()
        if name != "session"
    ]
    return signature.replace(parameters=others, return_annotation=_evaluated(signature.return_annotation, known))


def _evaluated(annotation: Any, known: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    only = SimpleNamespace(__annotations__={"it": annotation})
    try:
        found = get_type_hints(only, known, include_extras=True)["it"]
    except Exception:
        return annotation
    return None if found is type(None) else found


def signature_of(function: Callable[..., Any], session: Any) -> inspect.Signature:
    """Return the signature that callers see, where the decorator was given ``session``, or None."""
    if session is not None and takes_session(function):
        return signature_without_session(function)
    return inspect.signature(function)


def bind_arguments(function: Callable[..., Any], session: Any) -> Callable[..., Callable[..., Any]]:
    """Return a function that binds the arguments of a call; the runner adds the session, where there is one."""
    passes_session = session is not None and takes_session(function)
    call = function if is_async(function) else _refuse_unfinished(function)

    def bind(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        if session is None:
            return lambda: call(*args, **kwargs)
        if passes_session:
            return lambda opened: call(*args, **{**kwargs, "session": opened})
        return lambda _: call(*args, **kwargs)

    return bind


def _refuse_unfinished(function: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a result whose work is not done yet, such as a coroutine: it would be recorded before it is done."""

    def call(*args: Any, **kwargs: Any) -> Any:
        value = function(*args, **kwargs)
        if inspect.isawaitable(value) or inspect.isgenerator(value) or inspect.isasyncgen(value):
            close_unused(value)
            raise ConfigurationError(
                f"{name_of(function)} returned a {type(value).__name__}, whose work is not done yet: decorate the "
                "coroutine function itself, or use functools.wraps in its wrapper"
            )
        return value

    return call


def wrap_like(wrapper: Any, function: Callable[..., Any], session: Any) -> Any:
    """Give a wrapper the name and signature of the function, as callers and frameworks see it."""
    functools.update_wrapper(wrapper, function)
    if session is not None and takes_session(function):
        wrapper.__signature__ = signature_of(function, session)
    return wrapper

"""Functions of the user that are called and not awaited. Where a call would run nothing, they are refused."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from idempotency.errors import ConfigurationError

_logger = logging.getLogger("idempotency")
_logged: set[str] = set()

E = TypeVar("E")


class Hooks(Generic[E]):
    """Where the events of one adapter, relay or saga are delivered: to the log, and to the hooks of the user.

    ``on_event``: a hook, or a sequence of them. ``log``: the function that writes the log; None: there is no log.
    Raises :class:`~idempotency.errors.ConfigurationError` for a hook that cannot be called, or would not be awaited.
    """

    __slots__ = ("hooks", "log")

    def __init__(
        self, on_event: Callable[[E], object] | Sequence[Callable[[E], object]], log: Callable[[E], object] | None
    ) -> None:
        one: Any = on_event
        # A hook may be a sequence itself, such as a list that collects its events.
        several = isinstance(on_event, Sequence) and not isinstance(on_event, str) and not callable(on_event)
        given: Sequence[Callable[[E], object]] = one if several else (one,)
        for each in given:
            check_callable("on_event", each)
        # The log is written once, also where it is given as a hook.
        self.hooks = tuple(each for each in given if each is not log)
        self.log = log

    def deliver(self, event: E) -> None:
        """Give an event to the log and to each hook. What a hook raises is logged, and stops nothing."""
        if self.log is not None:
            self.log(event)
        for hook in self.hooks:
            try:
                returned = hook(event)
                if returned is not None:
                    discard_coroutine("on_event", hook, returned)
            except Exception:
                _logger.exception("the event hook failed")


def in_one_line(text: str) -> str:
    """Return a text as a line of the log has it: what a caller or a broker has sent must not begin a new line."""
    return text if text.isprintable() else ascii(text)


def import_named(what: str, path: str) -> Any:
    """Import what ``module:name`` names.

    Raises :class:`~idempotency.errors.ConfigurationError`, which says ``what`` is named so, where it is not there, and
    where the module raises an error of its own.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ConfigurationError(f"{what} module:name, not {path!r}")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{path!r} cannot be imported: {error}") from error
    except Exception as error:  # the module is the user's, and may raise anything
        raise ConfigurationError(f"{path!r} cannot be imported: {type(error).__name__}: {error}") from error
    return found


def import_from_here() -> None:
    """Let modules be imported from the directory in which the command was given."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def check_callable(name: str, function: object) -> None:
    """Refuse what cannot be called, and a function whose call only makes an object that nothing would run.

    That is a coroutine function or a generator function, also in a ``functools.partial``, and an object whose
    ``__call__`` is one. What a plain function returns is seen only at its call: see :func:`discard_coroutine`.
    """
    if not callable(function):
        raise ConfigurationError(f"{name} must be a function, not {function!r}")
    if is_coroutine_function(function):
        raise ConfigurationError(f"{name} must not be a coroutine function: what it returns is not awaited")
    if any(inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each) for each in _called(function)):
        raise ConfigurationError(f"{name} must not be a generator: nothing would run it")


def is_coroutine_function(function: object) -> bool:
    """Return whether a call of ``function`` makes a coroutine."""
    return any(inspect.iscoroutinefunction(each) for each in _called(function))


def discard_coroutine(name: str, function: object, returned: object) -> bool:
    """Close a coroutine that a function returned, and log it, once for each function; return whether it was one.

    Another awaitable, such as a task, runs by itself.
    """
    if not inspect.iscoroutine(returned):
        return False
    returned.close()
    text = f"{name} {getattr(function, '__qualname__', type(function).__qualname__)}"
    if text not in _logged:
        _logged.add(text)
        _logger.error("%s returned a coroutine, which is not awaited: give a function that is not async", text)
    return True


def _called(function: object) -> tuple[object, object]:
    """Return what a call may run: the function, without ``functools.partial``, and the ``__call__`` of its type."""
    while isinstance(function, functools.partial):
        function = function.func
    return function, getattr(type(function), "__call__", None)  # noqa: B004

"""The default name of a function, and whether two different functions of a process would share one."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import PurePath
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

_MAINS = ("__main__", "__mp_main__")
_COMPARED = (str, bytes, int, float, complex, tuple, frozenset, type, FunctionType, functools.partial, Enum, type(None))


def full_name_of(function: Callable[..., Any]) -> str:
    """Return a function's module and qualified name, the same in every process that has it.

    A partial has the name of its function, an object that of its class. For a function of the main module, the name by
    which other modules import that module is used.
    """
    named = _named(function)
    return f"{_importable(_module_of(named))}.{named.__qualname__}"


def _named(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function if hasattr(function, "__qualname__") else type(function)


def _module_of(named: Any) -> str:
    return getattr(named, "__module__", None) or ""


def _importable(module: str) -> str:
    if module not in _MAINS:
        return module
    main = sys.modules.get(module)
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return str(spec.name)
    return PurePath(file).stem if file else module


class DecoratedFunction:
    """A decorated function and the function of its key. It exists as long as the decorator's result.

    ``name`` is that under which its results are recorded, ``codec`` what turns them into bytes; None: their annotation.
    """

    __slots__ = ("__weakref__", "codec", "function", "key", "load", "name")

    def __init__(self, function: Any, key: Any = None, name: str = "", codec: Any = None) -> None:
        self.function = function
        self.key = key
        self.name = name
        self.codec = codec
        # A module that is loaded again has another spec object, by which two loads of it differ.
        self.load = getattr(sys.modules.get(_module_of(_named(function))), "__spec__", None)


def decorated(function: object) -> DecoratedFunction | None:
    """Return what a decorator of this library has made of a function; None where it is not decorated."""
    found = getattr(function, "_made", None)
    return found if isinstance(found, DecoratedFunction) else None


_MADE: WeakKeyDictionary[object, WeakValueDictionary[str, DecoratedFunction]] = WeakKeyDictionary()
"""The function that has each scope, by store."""


def scope_is_taken(store: object, scope: str, made: DecoratedFunction) -> bool:
    """Note which function has a scope of a store; return whether a different function has it already.

    The same function may be made again, by a module that is loaded again or a definition that is typed again; its code
    may have changed. Functions that one definition makes with different values, such as closures, are different, unless
    their key functions were made with different values too.
    """
    try:
        scopes = _MADE.setdefault(store, WeakValueDictionary())
    except TypeError:
        # A store of the user's own class may not allow weak references.
        return False
    if _is_free(scopes, scope, made) or (gc.collect() >= 0 and _is_free(scopes, scope, made)):
        scopes[scope] = made
        return False
    return True


def _is_free(scopes: WeakValueDictionary[str, DecoratedFunction], scope: str, made: DecoratedFunction) -> bool:
    first = scopes.get(scope)
    return (
        first is None
        or _same(first.function, made.function)
        or _made_with_others(first.key, made.key)
        or _loaded_again(first.load, made.load)
        or _typed_again(first.function, made.function)
    )


def _loaded_again(one: Any, other: Any) -> bool:
    return one is not other and one is not None and getattr(one, "origin", None) == getattr(other, "origin", "")


def _typed_again(one: Any, other: Any) -> bool:
    """Return whether a definition replaces another one in a notebook or at a prompt."""
    named = _named(other)
    main = sys.modules.get("__main__")
    return (
        _module_of(named) == "__main__"
        and getattr(main, "__spec__", None) is None
        and not hasattr(main, "__file__")
        and "<" not in named.__qualname__
        and _code(one) != _code(other)
    )


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other) or (
            _code(one) == _code(other) is not None and _are_alike(_values(one), _values(other))
        )
    except Exception:
        # Values that cannot be compared.
        return False


def _are_alike(some: list[Any], others: list[Any]) -> bool:
    # Objects with a state, such as a list or an engine, are not compared: a function that is made again has others.
    return len(some) == len(others) and all(
        one is other or (type(one) is type(other) and not isinstance(one, _COMPARED)) or bool(one == other)
        for one, other in zip(some, others, strict=True)
    )


def _made_with_others(one: Any, other: Any) -> bool:
    return _code(one) == _code(other) is not None and not _same(one, other)


def _code(function: Any) -> Any:
    if isinstance(function, functools.partial):
        return functools.partial, _code(function.func)
    return (function.__code__, function.__code__.co_filename) if isinstance(function, FunctionType) else None


def _values(function: Any) -> list[Any]:
    """Return the values that a function was made with, besides its code."""
    if isinstance(function, functools.partial):
        return [*function.args, *function.keywords, *function.keywords.values(), *_values(function.func)]
    closed = [cell.cell_contents for cell in function.__closure__ or ()]
    keywords = function.__kwdefaults__ or {}
    return [*closed, *(function.__defaults__ or ()), *keywords, *keywords.values()]

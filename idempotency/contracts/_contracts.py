"""What an application stores and sends, as contracts: each has a name, a version and a schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from idempotency._engine.names import decorated
from idempotency._results.codec import return_annotation
from idempotency._results.versioned import Versioned
from idempotency._signature import name_of
from idempotency.contracts._schema import Schema, schema_of, schema_of_fields
from idempotency.errors import ConfigurationError
from idempotency.saga._definition import definition_of
from idempotency.saga._input import Input
from idempotency.saga._undo import undo_input


@dataclass(frozen=True, slots=True)
class Contract:
    """The form of one thing that is stored, such as ``"result of shop.orders.charge"``, in one version."""

    name: str
    version: int
    schema: Schema


class Contracts:
    """All that an application stores and sends, to be checked by ``idempotency contracts check MODULE:NAME``.

    Each item is a :class:`~idempotency.streams.Versioned` or a class, of an event or a message; ``Streams``, for all of
    its event types; a function that is decorated by ``@idempotent``, ``@idempotent_consumer`` or ``@idempotent_tool``,
    for its result; a saga, for its arguments and its result; what :func:`step_of` returns, for a step of it; other
    ``Contracts``; or a list of these. The type of a snapshot of streams is given as a class or ``Versioned`` too.
    Raises :class:`~idempotency.errors.ConfigurationError` for anything else, for a type that has no JSON, and for two
    different contracts of one name.
    """

    def __init__(self, items: Iterable[object]) -> None:
        self._found: dict[str, Contract] = {}
        for item in items:
            for contract in _contracts_of(item):
                if self._found.setdefault(contract.name, contract) != contract:
                    raise ConfigurationError(f"two contracts are named {contract.name!r}: give one of them name=")

    def __iter__(self) -> Iterator[Contract]:
        return iter(sorted(self._found.values(), key=lambda each: each.name))

    def __len__(self) -> int:
        return len(self._found)


def step_of(
    saga: Any, name: str, function: Callable[..., Any], *, undo: Callable[..., Any] | None = None
) -> list[Contract]:
    """Return the contracts of a step: of its result, and of the arguments that are stored for its undo.

    ``name``, ``function`` and ``undo`` are those that the saga gives to :func:`~idempotency.saga.step`.
    Raises :class:`~idempotency.errors.ConfigurationError` for what is no saga, and for a type that has no JSON.
    """
    definition, child = definition_of(saga), definition_of(function)
    if definition is None:
        raise ConfigurationError(f"{name_of(saga)} is no saga")
    step = f"step {name} of {definition.name}"
    found = [_result(step, function if child is None else child.function, None)]
    if undo is not None:
        found.append(Contract(f"arguments of the undo of {step}", 1, _arguments(undo_input(undo))))
    return found


def _contracts_of(item: Any) -> Iterator[Contract]:
    definition, made = definition_of(item), decorated(item)
    if isinstance(item, Contracts | list | tuple):
        yield from Contracts(item) if not isinstance(item, Contracts) else item
    elif isinstance(item, Contract):
        yield item
    elif isinstance(item, Versioned):
        yield _versioned(f"type {item.name}", item)
    elif definition is not None:
        yield Contract(f"arguments of {definition.name}", 1, _arguments(definition.input))
        yield _result(definition.name, definition.function, None)
    elif made is not None:
        yield _result(made.name, made.function, made.codec)
    elif isinstance(item, type):
        yield _versioned(f"type {item.__name__}", Versioned(item))
    elif (types := _event_types(item)) is not None:
        for each in types:
            yield _versioned(f"type {each.name}", each)
    else:
        raise ConfigurationError(
            f"{item!r} has no contract: give a class, a Versioned, Streams, a saga, or a function that this library"
            " decorates"
        )


def _event_types(item: object) -> list[Versioned[Any]] | None:
    try:
        from idempotency.streams import Streams
    except ImportError:
        return None  # without SQLAlchemy there are no streams
    return item.event_types if isinstance(item, Streams) else None


def _versioned(name: str, known: Versioned[Any]) -> Contract:
    return Contract(name, known.version, schema_of(known.kind, known.name))


def _arguments(given: Input) -> Schema:
    required = {*given.annotations} - given.optional
    return schema_of_fields(given.annotations, required)


def _result(name: str, function: Any, codec: Any) -> Contract:
    name = f"result of {name}"
    if isinstance(codec, Versioned):
        return _versioned(name, codec)
    if codec is not None:
        raise ConfigurationError(
            f"what {type(codec).__name__} writes for the {name} cannot be seen: give codec=Versioned(...)"
        )
    annotation = return_annotation(function)
    if annotation is inspect.Signature.empty:
        return Contract(name, 1, {})
    return Contract(name, 1, schema_of(annotation, name))

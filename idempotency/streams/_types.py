"""The types of events: how events become rows, and rows become events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from idempotency._outbox.message import time_ordered_id
from idempotency._outbox.payload import encode_headers, headers_as_text
from idempotency._results.by_annotation import load, scan
from idempotency._results.versioned import Versioned
from idempotency.errors import ConfigurationError, UnreadableError
from idempotency.operation import Operation
from idempotency.streams._position import Position, RecordedEvent
from idempotency.streams._reached import Row

_SCANNED_AT_ONCE = 50
"""How many events have their JSON read by one call, which takes half the time of one call for each."""

_UNREAD = object()


class EventTypes:
    """The types of the events of a table."""

    def __init__(self, event_types: Iterable[type | Versioned[Any]]) -> None:
        self._by_name: dict[str, Versioned[Any]] = {}
        self._by_class: dict[type, Versioned[Any]] = {}
        for each in event_types:
            known = each if isinstance(each, Versioned) else Versioned(each)
            if known.name in self._by_name or known.kind in self._by_class:
                raise ConfigurationError(f"two event types are named {known.name}, or are of one class: give name=")
            self._by_name[known.name] = self._by_class[known.kind] = known

    @property
    def all(self) -> list[Versioned[Any]]:
        """Return the types."""
        return list(self._by_name.values())

    def rows(
        self, stream: str, events: Sequence[object], headers: Mapping[str, str] | None, operation: Operation | None
    ) -> list[Row]:
        """Return events as they are written; ConfigurationError for what cannot be written."""
        if not events:
            raise ConfigurationError("there are no events to append")
        text = headers_as_text(encode_headers(headers))
        rows: list[Row] = []
        for kind, data in [self._written(event) for event in events]:
            # An operation counts its ids: what is refused gets none.
            id_ = time_ordered_id() if operation is None else operation.next_message_id(*id_names(stream, kind.name))
            fields = {"type": kind.name, "type_version": kind.version, "data": data, "headers": text}
            rows.append({"id": id_, **fields})
        return rows

    def _written(self, event: object) -> tuple[Versioned[Any], str]:
        kind = self._by_class.get(type(event))
        if kind is None:
            known = ", ".join(sorted(self._by_name)) or "none"
            raise ConfigurationError(f"{type(event).__name__} is not in event_types, which has {known}")
        try:
            return kind, kind.dump(event).decode()
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{kind.name} cannot be written: {error}") from error

    def recorded(self, rows: Sequence[Any]) -> Iterator[RecordedEvent]:
        """Return the events of rows, which become objects one at a time."""
        # One function for all of them, and tuples that are not made by their class, since a call takes as long as most
        # of what is done here.
        kinds, new = self._by_name, tuple.__new__
        for start in range(0, len(rows), _SCANNED_AT_ONCE):
            part = rows[start : start + _SCANNED_AT_ONCE]
            values = _scanned([row[7] for row in part])
            for row, value in zip(part, values, strict=True):
                place, seq, stream, version, id_, name, type_version, data, headers, created_ms = row
                kind = kinds.get(name) or _unknown(stream, name)
                if value is _UNREAD:
                    event = kind.load(type_version, data)
                else:
                    try:
                        event = kind.readers[type_version](value)
                    except Exception:
                        event = kind.load(type_version, data)  # which raises an error that says more
                position = None if place is None else new(Position, (place, seq))
                read_headers = load(headers) if headers else {}
                yield new(RecordedEvent, (stream, version, id_, name, event, position, created_ms / 1000, read_headers))


def id_names(stream: str, kind: str) -> tuple[str, ...]:
    """Return the names for which an operation gives the id of an event."""
    return "event", stream, kind


def _scanned(texts: list[str]) -> list[Any]:
    """Return the JSON values of texts, by one call; ``_UNREAD`` for each of them where one is no JSON."""
    joined = f"[{','.join(texts)}]"
    try:
        values, end = scan(joined, 0)
    except Exception:
        values, end = [], -1
    return values if len(values) == len(texts) and end == len(joined) else [_UNREAD] * len(texts)


def _unknown(stream: str, name: str) -> NoReturn:
    raise UnreadableError(
        f"{stream} has an event of type {name}, which is not in event_types: deploy the code that knows it, or give a"
        " class that was renamed its old name, Versioned(..., name=)"
    )

"""The journal of sagas in a SQL database, as a function of a connection: the store's own, or that of a caller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from itertools import count
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, Dialect, MetaData, inspect
from sqlalchemy.exc import DBAPIError

from idempotency._durations import milliseconds
from idempotency._sagas.journal import (
    FORMAT,
    Amend,
    Browse,
    Due,
    Leave,
    Look,
    Open,
    Purge,
    Put,
    Request,
    Row,
    Wake,
    Write,
)
from idempotency._sql.failures import MadeBy, conflicts, describe_failure, is_repeatable, lacks_table, unusable
from idempotency._sql.sqlite import lowered_lock_wait
from idempotency._sql.tables import create_tables
from idempotency.errors import IdempotencyError, UnreadableError
from idempotency.stores._saga_sealing import newer, readable, sealed, shown
from idempotency.stores._sealing import Sealing
from idempotency.stores.sql._limits import check_bytes
from idempotency.stores.sql._saga_elsewhere import Elsewhere
from idempotency.stores.sql._saga_postgresql import OnPostgreSQL
from idempotency.stores.sql._saga_rows import read_put, read_rows, read_saga
from idempotency.stores.sql._saga_statements import (
    AMEND,
    BROWSE,
    DUE,
    LEAVE,
    LOOK,
    WAKE,
    WRITE,
    Change,
    Changed,
    SagaStatements,
)
from idempotency.stores.sql._saga_table import saga_tables
from idempotency.stores.sql._table import SCHEMAS
from idempotency.stores.sql._values import as_flag, in_ascii

R = TypeVar("R")

SAGAS = MadeBy(
    "idempotency schema create --sagas",
    "SQLStore.create_saga_schema() or create_saga_schema_sync()",
    "idempotency.stores.sql.saga_tables",
)
_WRITING = Open | Write | Leave | Put | Wake | Amend | Purge


class SagaVerbs:
    """The journal over the tables of sagas beside the table of records that is named ``table``.

    ``lock_wait``: for how many seconds the server may wait for a lock in any statement.
    """

    def __init__(self, table: str, lock_wait: float) -> None:
        self.tables = saga_tables(MetaData(), table)
        self._lock_wait = lock_wait
        self._in_schema = lru_cache(SCHEMAS)(self._make)

    def answer(self, connection: Connection, request: Request[R], sealing: Sealing | None) -> R:
        """Answer a request, by a transaction of its own where that takes several statements."""
        stored = sealed(sealing, request)
        with self._describing(connection), self._waiting(connection, stored):
            if not isinstance(stored, _WRITING):
                return cast(R, self._answer_or_create(connection, stored, sealing))
            with _written_unread(connection), self._of(connection, joined=False).writing(connection):
                return cast(R, self._answer_or_create(connection, stored, sealing))

    def answer_in(self, connection: Connection, request: Write | Open, sealing: Sealing | None) -> object:
        """Answer a request in the transaction of the caller."""
        stored: Request[Any] = sealed(sealing, request)
        with self._describing(connection), self._waiting(connection, stored):
            return self._answer_or_create(connection, stored, sealing, joined=True)

    def create(self, connection: Connection) -> None:
        """Create the tables and their indexes where they are missing."""
        create_tables(connection, *self.tables)

    def exists(self, connection: Connection) -> bool:
        """Return whether one of the tables is there."""
        here = self.tables.located(connection.schema_for_object(self.tables.sagas))
        return any(inspect(connection).has_table(each.name, each.schema) for each in here)

    def _make(self, dialect: Dialect, schema: str | None, joined: bool) -> OnPostgreSQL | Elsewhere:
        tables = self.tables.located(schema)
        if dialect.name == "postgresql":
            return OnPostgreSQL(dialect, tables, self._lock_wait, joined)
        return Elsewhere(dialect, tables, self._lock_wait)

    def _of(self, connection: Connection, joined: bool) -> OnPostgreSQL | Elsewhere:
        return self._in_schema(connection.dialect, connection.schema_for_object(self.tables.sagas), joined)

    @contextmanager
    def _describing(self, connection: Connection) -> Iterator[None]:
        """Raise what fails within as a StoreError about these tables, unless the request may succeed if repeated."""
        try:
            yield
        except IdempotencyError:
            raise
        except Exception as error:  # a driver whose connection dies may raise anything
            if is_repeatable(error) or unusable(error) or conflicts(error):
                raise
            table = self.tables.located(connection.schema_for_object(self.tables.sagas)).sagas.fullname
            failure = describe_failure(error, connection.engine.url, table, SAGAS)
            raise failure from getattr(error, "orig", None) or error

    def _waiting(self, connection: Connection, request: Request[Any]) -> AbstractContextManager[None]:
        if connection.dialect.name != "sqlite" or not isinstance(request, _WRITING):
            return nullcontext()
        return lowered_lock_wait(connection, self._lock_wait)

    def _answer_or_create(
        self, connection: Connection, request: Request[Any], sealing: Sealing | None, joined: bool = False
    ) -> object:
        try:
            return self._answer(connection, request, sealing, joined)
        except DBAPIError as error:
            if connection.dialect.name != "sqlite" or not lacks_table(error):
                raise
            self.create(connection)
            return self._answer(connection, request, sealing, joined)

    def _answer(self, connection: Connection, request: Request[Any], sealing: Sealing | None, joined: bool) -> object:
        check_bytes(connection, _size(request), "what is written of the saga")
        database = self._of(connection, joined)
        match request:
            case Open():
                return read_saga(database.open(connection, _open_values(database.sql, request)), sealing)
            case Write() | Leave() | Wake() | Amend():
                return _answer_to(request, database.change(connection, _change(request)))
            case Put():
                values = {"id": request.id, **database.sql.written([request.entry])}
                return read_put(database.put(connection, values), request.id, sealing)
            case Look():
                return read_saga(database.sql.execute(connection, LOOK, {"id": request.id}).all(), sealing)
            case Due():
                return _due(connection, database.sql, request, sealing)
            case Browse():
                return _browse(connection, database.sql, request, sealing)
            case Purge():
                return database.purge(connection, request.batch)
            case _:
                raise AssertionError(request)


@contextmanager
def _written_unread(connection: Connection) -> Iterator[None]:
    """Commit what is written within also where it cannot be read, as by an owner who has not the key of an entry."""
    try:
        yield
    except UnreadableError:
        if (transaction := connection.get_transaction()) is not None:
            transaction.commit()
        raise


def _due(connection: Connection, sql: SagaStatements, request: Due, sealing: Sealing | None) -> list[Row]:
    # One that cannot be read is due for ever: it must not take the place of the others.
    found: list[Row] = []
    for after in count(0, max(1, request.limit)):
        names = sql.named(request.names)
        values = {**names, "every": not names, "limit": request.limit, "after": after}
        page = sql.execute(connection, DUE, values, len(names)).all()
        found += readable(sealing, read_rows(page))
        if len(found) >= request.limit or len(page) < request.limit:
            break
    return found[: request.limit]


def _browse(connection: Connection, sql: SagaStatements, request: Browse, sealing: Sealing | None) -> list[Row]:
    names = sql.named([] if request.name is None else [request.name])
    wanted = {"every": not names, "ended": request.ended, "stuck": request.stuck, "limit": request.limit}
    page = sql.execute(connection, BROWSE, {**names, **wanted}, len(names)).all()
    return [shown(sealing, row) for row in read_rows(page)]


def _open_values(sql: SagaStatements, request: Open) -> dict[str, Any]:
    owns = request.lease > 0
    return {
        "id": request.id,
        "name": sql.stored_name(request.name),
        "key": in_ascii(request.key),
        "token": request.token if owns else "",
        "owns": owns,
        "fingerprint": request.fingerprint,
        "input": request.input or b"",
        "records": request.input is not None,
        "lease": milliseconds(request.lease),
        "deadline": None if request.deadline is None else milliseconds(request.deadline),
    }


def _change(request: Write | Leave | Wake | Amend) -> Change:
    values: dict[str, Any] = {"id": request.id, "token": ""}
    if isinstance(request, Wake):
        return Change(WAKE, values)
    entries = list({entry.name: entry for entry in request.entries}.values())
    values |= {"phase": None if request.phase is None else int(request.phase), "result": request.result}
    match request:
        case Amend():
            values |= {"seen": request.attempt, "token": request.token}
            return Change(AMEND, values, entries, list(dict.fromkeys(request.without)))
        case Write():
            values |= {"token": request.token, "lease": milliseconds(request.lease), "anew": request.progress}
            return Change(WRITE, values, entries)
        case Leave():
            values |= {
                "token": request.token,
                "ended": request.phase is not None and request.phase.ended,
                "wakes": request.wakes,
                "due": None if request.due is None else milliseconds(request.due),
                "ttl": milliseconds(request.ttl),
                "reason": request.reason or None,
            }
            return Change(LEAVE, values, entries)


def _answer_to(request: Write | Leave | Wake | Amend, found: Changed) -> int | bool | None:
    state = found.state
    if found.changed:
        return int(state.wakes) if isinstance(request, Write) else True
    nothing = None if isinstance(request, Write) else False
    if state is None or state.expired:
        return nothing
    if state.version > FORMAT:
        raise newer(int(state.version))
    # Whether a Leave was answered before, and the answer was lost.
    return as_flag(state.ours) and not as_flag(state.owned) if isinstance(request, Leave) else nothing


def _size(request: Request[Any]) -> int:
    match request:
        case Open():
            return len(request.input or b"")
        case Put():
            return len(request.entry.body)
        case Write() | Leave() | Amend():
            return len(request.result or b"") + sum(len(entry.body) for entry in request.entries)
        case _:
            return 0

"""A SQL store, and raw statements through SQLAlchemy's asyncio engine."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import Engine, MetaData, bindparam, event, func, make_url, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import create_async_engine
from subjects import FINGERPRINT, RESULT, Subject, Verb, claim_of

from idempotency import open_store
from idempotency._rules import Claim
from idempotency.stores.sql import audit_table, records_table

_BATCH = 10_000
_DAY = 86_400_000
_BINARY = ("id", "fingerprint", "result")
_OWN = {"id": "bytea", "scope": "text", "key": "text", "token": "text", "expires_ms": "bigint"}
_NAMES = {"postgresql": "PostgreSQL", "mysql": "MariaDB/MySQL", "mariadb": "MariaDB/MySQL", "sqlite": "SQLite"}
_SETTLE = {
    "postgresql": ("VACUUM (ANALYZE) {}", "CHECKPOINT"),
    "sqlite": ("PRAGMA wal_checkpoint(TRUNCATE)",),
    "mysql": ("ANALYZE TABLE {}",),
}

_STORED = "SELECT pg_relation_size('{0}'), pg_indexes_size('{0}'), pg_total_relation_size('{0}')"
_LOGGED = "SELECT CAST(pg_current_wal_insert_lsn() - '0/0' AS bigint)"

Statement = tuple[str, Any]


class SQL(Subject):
    """One SQL database. Raw statements are those that the store sent, with another key in their parameters."""

    def __init__(self, url: str, place: str) -> None:
        self.url = url
        self.place = place
        self._table = records_table(MetaData(), place)
        self._family = make_url(url).get_backend_name()
        self.name = _NAMES[self._family]
        if self._family == "postgresql":
            self.most = 100_000_000

    async def open(self) -> None:
        """Create the table, open the store, and record what it sends."""
        self.store = open_store(self.url, table=self.place)
        await self.store.create_schema()
        self._engine = create_async_engine(self.url)
        self._sample = claim_of("sample")
        await self.store.claim(claim_of("warm-up"))
        self._seen: dict[Verb, list[Statement]] = {}
        self._commits = False
        verbs: dict[Verb, Callable[[], Awaitable[object]]] = {
            "claim": lambda: self.store.claim(self._sample),
            "complete": lambda: self.store.complete(self._sample, RESULT),
            "replay": self._replay,
        }
        for verb, work in verbs.items():
            with _statements() as seen, _commits() as commits:
                await work()
            self._seen[verb] = seen
            self._commits = self._commits or bool(commits)
        self._raw = self._engine if self._commits else self._engine.execution_options(isolation_level="AUTOCOMMIT")

    async def _replay(self) -> None:
        # The id of the sample, and a token by which the parameters of a raw replay are recognised.
        self._again = claim_of("sample")
        await self.store.claim(self._again)

    async def close(self) -> None:
        """Drop the table, and that of the audit."""
        await self.store.aclose()
        async with self._engine.begin() as connection:
            for table in (self._table, audit_table(MetaData(), self.place)):
                await connection.run_sync(table.drop, checkfirst=True)
        await self._engine.dispose()

    async def fill(self, keys: Sequence[str]) -> None:
        """Insert finished records in batches."""
        await self._insert(keys, _DAY)

    async def settle(self) -> None:
        """Gather statistics, and write to the tables what is still in memory and logs after the inserts."""
        statements = _SETTLE.get(self._family, ())
        async with self._engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            for statement in statements:
                # CHECKPOINT needs a right that the user may not have, and it is not required.
                with suppress(ProgrammingError):
                    await connection.exec_driver_sql(statement.format(self.place))

    async def fill_expired(self, keys: Sequence[str]) -> None:
        """Insert records that expired a day ago."""
        await self._insert(keys, -_DAY)

    def purge_command(self) -> list[str] | None:
        """Return the command of an operator; None on SQLite, which has one writer at a time."""
        if self._family == "sqlite":
            return None
        return [sys.executable, "-m", "idempotency", "purge", "--store", self.url, "--table", self.place]

    async def stored(self) -> dict[str, int]:
        """Return the sizes of the table's files on PostgreSQL."""
        if self._family != "postgresql":
            return {}
        row, index, every = await self._first(_STORED.format(self.place))
        return {"row": row, "indexes": index, "TOAST and maps": every - row - index}

    async def oldest(self) -> int | None:
        """Return the least time in the column on which a purge selects."""
        oldest: int | None = (await self._first(f"SELECT MIN(expires_ms) FROM {self.place}"))[0]
        return oldest

    async def logged(self) -> int | None:
        """Return the position in the write-ahead log of PostgreSQL, to which all its databases write."""
        return None if self._family != "postgresql" else int((await self._first(_LOGGED))[0])

    async def _first(self, statement: str) -> Any:
        async with self._engine.connect() as connection:
            return (await connection.exec_driver_sql(statement)).one()

    async def _insert(self, keys: Sequence[str], lasts: int) -> None:
        for start in range(0, len(keys), _BATCH):
            rows = _rows(keys[start : start + _BATCH], lasts)
            arrays = self._family == "postgresql"
            async with self._engine.begin() as connection:
                await connection.execute(*(self._of_arrays(rows) if arrays else self._of_rows(rows)))

    def _of_arrays(self, rows: Sequence[dict[str, Any]]) -> tuple[Any, Any]:
        # One statement for a batch: ten million rows take minutes, and not an hour.
        values = {name: value for name, value in rows[0].items() if name not in _OWN}
        arrays = ", ".join(f"CAST(:{name} AS {kind}[])" for name, kind in _OWN.items())
        insert = text(
            f"INSERT INTO {self.place} ({', '.join((*_OWN, *values))})"
            f" SELECT own.*, {', '.join(f':{name}' for name in values)} FROM unnest({arrays}) AS own"
        )
        return insert, values | {name: [row[name] for row in rows] for name in _OWN}

    def _of_rows(self, rows: Sequence[dict[str, Any]]) -> tuple[Any, Any]:
        insert = self._table.insert()
        if self._family not in ("mysql", "mariadb"):
            return insert, rows
        # aiomysql and the current PyMySQL under it disagree on how to escape bytes.
        hexed = {name: func.unhex(bindparam(f"{name}_hex")) for name in _BINARY}
        return insert.values(hexed), [_hexed(row) for row in rows]

    def command(self, verb: Verb, claim: Claim) -> list[Statement]:
        """Return the statements that the store sent."""
        sample = self._again if verb == "replay" else self._sample
        other: dict[Hashable, Any] = {
            sample.id: claim.id,
            sample.id.hex(): claim.id.hex(),
            sample.key: claim.key,
            sample.token: claim.token,
        }
        return [(text, _replaced(parameters, other)) for text, parameters in self._seen[verb]]

    async def send(self, command: list[Statement]) -> None:
        """Execute the statements on one connection, in a transaction if the store opens one."""
        async with self._raw.begin() if self._commits else self._raw.connect() as connection:
            for text, parameters in command:
                await connection.exec_driver_sql(text, parameters)

    async def cheapest(self, _: object) -> None:
        """Select a number."""
        async with self._raw.begin() if self._commits else self._raw.connect() as connection:
            await connection.exec_driver_sql("SELECT 1")

    async def count(self, work: Callable[[], Awaitable[object]]) -> int:
        """Count the statements that reach the driver."""
        with _statements() as seen:
            await work()
        return len(seen)


def _rows(keys: Sequence[str], lasts: int) -> list[dict[str, Any]]:
    """Make rows as claim and completion write them; each expires one millisecond after the one before."""
    now = round(time.time() * 1000)
    common = {
        "version": 1, "state": 2, "fingerprint": FINGERPRINT, "attempt": 1, "hold": False, "watched": False,
        "created_ms": now, "lease_until_ms": now, "result": RESULT,
    }  # fmt: skip
    return [
        {"id": claim.id, "scope": claim.scope, "key": claim.key, "token": claim.token, "expires_ms": expires, **common}
        for expires, claim in enumerate(map(claim_of, keys), now + lasts)
    ]


def _hexed(row: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_hex" if name in _BINARY else name: _hex(value) for name, value in row.items()}


def _hex(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


@contextmanager
def _statements() -> Iterator[list[Statement]]:
    seen: list[Statement] = []

    def saw(_connection: Any, _cursor: Any, text: str, parameters: Any, _context: Any, _many: bool) -> None:
        seen.append((text, parameters))

    event.listen(Engine, "before_cursor_execute", saw)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", saw)


@contextmanager
def _commits() -> Iterator[list[Any]]:
    seen: list[Any] = []

    def saw(connection: Any) -> None:
        seen.append(connection)

    event.listen(Engine, "commit", saw)
    try:
        yield seen
    finally:
        event.remove(Engine, "commit", saw)


def _replaced(parameters: Any, other: dict[Hashable, Any]) -> Any:
    if isinstance(parameters, dict):
        return {name: other.get(value, value) for name, value in parameters.items()}
    return tuple(other.get(value, value) for value in parameters)

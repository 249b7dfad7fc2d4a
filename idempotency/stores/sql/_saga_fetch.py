"""Rows of statements that asyncpg is sent directly: SQLAlchemy takes several times as long for each of them."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Dialect, TextClause

from idempotency._sql.driver import fetch
from idempotency._sql.failures import is_repeatable, refuses_one
from idempotency._sql.send import Compiled, is_observed, pooled
from idempotency._sql.sqlite import drop_closed


def may_fetch(connection: Connection) -> bool:
    """Return whether a statement is a transaction of its own, and nothing of the application takes part in it."""
    return (
        connection.dialect.driver == "asyncpg"
        and connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"
        and not is_observed(connection.engine, drop_closed)
    )


class Fetched:
    """A statement, and how its rows are made."""

    def __init__(self, statement: TextClause, dialect: Dialect) -> None:
        self._compiled = Compiled(statement, dialect)
        self._row: Any = None

    def rows(self, connection: Connection, values: Mapping[str, Any]) -> Sequence[Any] | None:
        """Return the rows; None where SQLAlchemy has to send the statement, to find out what is wrong."""
        driver: Any = pooled(connection).driver_connection
        try:
            found = fetch("asyncpg", driver, self._compiled.sql, self._compiled.parameters(values))
        except Exception as error:
            if refuses_one(error) or is_repeatable(error):
                raise
            return None
        except BaseException as error:
            # Interrupted at an unknown point: the server may still send an answer.
            connection.invalidate(error)
            raise
        return [self._made(each) for each in found]

    def _made(self, found: Any) -> Any:
        if self._row is None:
            # Types are for names that are known before a statement is sent.
            make: Any = namedtuple
            self._row = make("Row", found.keys())
        return self._row._make(found)

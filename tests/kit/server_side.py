"""What a database server itself says of the connections to one of its databases."""

from __future__ import annotations

import asyncio
import time

import sqlalchemy
from sqlalchemy import text

from tests.kit.servers import with_driver

_WAITING = {
    "postgresql": (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND state = 'active' AND backend_type = 'client backend'"
    ),
    "mysql": (
        "SELECT count(*) FROM information_schema.processlist WHERE db = database() AND id <> connection_id()"
        " AND command = 'Query'"
    ),
}
_OPEN = {
    "postgresql": (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND xact_start IS NOT NULL AND backend_type = 'client backend'"
    ),
    "mysql": (
        "SELECT count(*) FROM information_schema.innodb_trx JOIN information_schema.processlist"
        " ON id = trx_mysql_thread_id WHERE db = database() AND id <> connection_id()"
    ),
}
_SYNC = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}
# InnoDB makes what its views show anew ten times a second at most.
_LOOK = 0.12


def end_what_sleeps(connection: sqlalchemy.Connection) -> None:
    """End statements that sleep 60 seconds and whose client is gone: a server sees that only when they are done."""
    if connection.dialect.name == "postgresql":
        ended = (
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = current_database()"
            " AND query = 'SELECT pg_sleep(60)' AND pid <> pg_backend_pid()"
        )
        connection.execute(text(ended))
    elif connection.dialect.name == "mysql":
        sleeping = "SELECT id FROM information_schema.processlist WHERE db = database() AND info = 'SELECT SLEEP(60)'"
        for thread in connection.execute(text(sleeping)).scalars().all():
            connection.execute(text(f"KILL {thread:d}"))


class ServerSide:
    """Ask the server at ``url``, by a connection of its own, about the database that the URL names."""

    def __init__(self, url: str) -> None:
        family = sqlalchemy.make_url(url).get_backend_name()
        self._waiting, self._open = text(_WAITING[family]), text(_OPEN[family])
        self._engine = sqlalchemy.create_engine(
            with_driver(url, _SYNC[family]), isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool
        )

    def statements(self) -> int:
        """Count the statements under way, such as those that wait for a lock."""
        return self._count(self._waiting)

    def transactions(self) -> int:
        """Count the connections in a transaction."""
        return self._count(self._open)

    def _count(self, query: sqlalchemy.TextClause) -> int:
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    async def quiet(self, seconds: float) -> bool:
        """Wait up to ``seconds`` until no statement and no transaction is left."""
        end = time.monotonic() + seconds
        while self.statements() or self.transactions():
            if time.monotonic() > end:
                return False
            await asyncio.sleep(_LOOK)
        return True

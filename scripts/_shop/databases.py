"""Where the services of the shop have their databases: files, or databases of their own on a server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

SERVICES = ("orders", "inventory", "marketing", "agents")


@asynccontextmanager
async def databases(url: str | None, name: str, directory: Path) -> AsyncIterator[str]:
    """Yield the URL of the databases, with braces for the name of a service; on a server they are dropped at the end.

    ``url``: a database of a server, in which nothing is written. None: files in ``directory``.
    """
    if url is None or make_url(url).get_backend_name() == "sqlite":
        yield f"sqlite+aiosqlite:///{directory}/{{}}.db"
        return
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    names = [f"{name}_{service}" for service in SERVICES]
    try:
        await _execute(engine, [f"CREATE DATABASE {each}" for each in names])
        place = make_url(url).set(database=f"{name}_{{}}").render_as_string(hide_password=False)
        yield place.replace("%7B", "{").replace("%7D", "}")
    finally:
        force = " WITH (FORCE)" if engine.dialect.name == "postgresql" else ""
        await _execute(engine, [f"DROP DATABASE IF EXISTS {each}{force}" for each in names])
        await engine.dispose()


async def _execute(engine: AsyncEngine, statements: Sequence[str]) -> None:
    async with engine.connect() as connection:
        for statement in statements:
            await connection.execute(text(statement))

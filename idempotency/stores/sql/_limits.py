"""How large a result may be. It is checked before it is sent: a server ends the connection that sends too much."""

from __future__ import annotations

from sqlalchemy import Connection

from idempotency.errors import StoreRefusedError

_SMALL = 32 * 1024
"""Bytes of a result that every server takes."""

_REST = 4096
"""Bytes for the rest of the statement."""

# PostgreSQL takes 1 GiB for a message and for a value, and drivers that send text write two digits for a byte. SQLite
# takes a billion bytes for a row.
_LARGEST = {"postgresql": 512 * 1024**2 - _REST, "sqlite": 10**9 - 1024**2}
_PACKET = "idempotency: max_allowed_packet"


def check_size(connection: Connection, result: bytes | None) -> None:
    """Raise StoreRefusedError for a result that the server of ``connection`` does not take, before anything is sent."""
    check_bytes(connection, 0 if result is None else len(result), "the result")


def check_bytes(connection: Connection, size: int, what: str) -> None:
    """Raise StoreRefusedError for so many bytes in one statement, as :func:`check_size` does; ``what`` they are."""
    if size <= _SMALL:
        return
    largest = _LARGEST.get(connection.dialect.name)
    if largest is None:
        # It is sent as base64.
        largest = (_packet(connection) - _REST) // 4 * 3
    if size > largest:
        raise StoreRefusedError(f"{what} of {size} bytes is larger than the database takes ({largest})")


def _packet(connection: Connection) -> int:
    # Asked once for each connection of the driver: the value of a connection does not change.
    known: int | None = connection.info.get(_PACKET)
    if known is None:
        known = connection.info[_PACKET] = int(connection.exec_driver_sql("SELECT @@max_allowed_packet").scalar_one())
    return known

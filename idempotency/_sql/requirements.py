"""What to install for a database URL: the drivers to recommend, and the packages that they come in.

This module does not import SQLAlchemy: it is used where SQLAlchemy is not installed.
"""

from __future__ import annotations

from typing import NamedTuple

from idempotency.errors import ConfigurationError

DATABASES = {"postgresql": "PostgreSQL", "mysql": "MySQL", "mariadb": "MariaDB", "sqlite": "SQLite"}
"""The databases that the statements are written for, by the name in their URLs."""


class Driver(NamedTuple):
    """A driver to recommend: how its URLs begin, and what to give to pip, None if it is part of Python."""

    scheme: str
    requirement: str | None

    def __str__(self) -> str:
        command = "" if self.requirement is None else f" (pip install '{self.requirement}')"
        return f"{self.scheme}://{command}"


ASYNC_DRIVERS = {
    "postgresql": Driver("postgresql+asyncpg", "asgi-idempotency[postgresql]"),
    "mysql": Driver("mysql+aiomysql", "asgi-idempotency[mysql]"),
    "mariadb": Driver("mariadb+aiomysql", "asgi-idempotency[mysql]"),
    "sqlite": Driver("sqlite+aiosqlite", "asgi-idempotency[sqlite]"),
}
SYNC_DRIVERS = {
    "postgresql": Driver("postgresql+psycopg", "asgi-idempotency[psycopg]"),
    "mysql": Driver("mysql+pymysql", "pymysql"),
    "mariadb": Driver("mariadb+pymysql", "pymysql"),
    "sqlite": Driver("sqlite", None),
}

_PACKAGES = {
    "MySQLdb": "mysqlclient",
    "aiomysql": "asgi-idempotency[mysql]",
    "aiosqlite": "asgi-idempotency[sqlite]",
    "asyncpg": "asgi-idempotency[postgresql]",
    "psycopg": "asgi-idempotency[psycopg]",
}
"""What to install for a driver's module, where the package has another name."""


def not_installed(scheme: str, module: str, requirement: str) -> ConfigurationError:
    """Return the error for a URL whose package is missing."""
    return ConfigurationError(f"{scheme}:// needs {module}, which is not installed: pip install '{requirement}'")


def driver_not_installed(scheme: str, module: str) -> ConfigurationError:
    """Return the error for a URL whose driver, the Python module ``module``, is missing."""
    if "+" in scheme:
        return not_installed(scheme, module, _PACKAGES.get(module, module))
    return ConfigurationError(
        f"{scheme}:// names no driver, and SQLAlchemy's default, {module}, is not installed:"
        f" asynchronous code uses {ASYNC_DRIVERS[scheme]}, synchronous code {SYNC_DRIVERS[scheme]}"
    )


def sqlalchemy_not_installed(scheme: str) -> ConfigurationError:
    """Return the error for a database URL where SQLAlchemy is missing; it names the extra that has the driver too."""
    extras = {driver.scheme: driver.requirement for driver in ASYNC_DRIVERS.values()}
    return not_installed(scheme, "SQLAlchemy", extras.get(scheme) or "asgi-idempotency[sql]")

"""The checks of the sessions that the library is given, before it writes or commits with them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import URL
from sqlalchemy.exc import InvalidRequestError, UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from idempotency._sql.commit_guard import TWO_PHASES, install
from idempotency._sql.engines import level_of
from idempotency._sql.guarded_connection import COMMITS_BY_ITSELF, commits_by_itself
from idempotency.errors import ConfigurationError, TransactionError

Sessionmaker = sessionmaker[Any] | async_sessionmaker[Any]


def is_synchronous(sessions: object) -> bool:
    """Return whether ``sessions`` makes synchronous sessions."""
    return isinstance(sessions, sessionmaker) and not issubclass(sessions.class_, AsyncSession)


def check_sessionmaker(sessions: object, kind: type[Sessionmaker]) -> None:
    """Raise ConfigurationError unless ``sessions`` is a ``kind`` whose sessions the library can guard and commit."""
    if not isinstance(sessions, kind):
        raise ConfigurationError(
            f"session= takes a factory here, {kind.__name__}(engine), not {type(sessions).__name__}"
        )
    options: dict[str, Any] = sessions.kw
    bind = options.get("bind")
    _check_kind(sessions.class_, bind, kind)
    if any(each is not bind for each in (options.get("binds") or {}).values()):
        raise ConfigurationError("the sessions have more than one bind: each would be committed by itself")
    if isinstance(bind, Connection | AsyncConnection):
        raise ConfigurationError(
            "the sessions are bound to a connection, which may be in another transaction: bind them to an engine"
        )
    if options.get("twophase"):
        raise ConfigurationError(TWO_PHASES)
    if not options.get("autobegin", True):
        raise ConfigurationError("the sessions have autobegin=False: their transaction has to begin at the first use")
    # Already here, when the application starts: later, another thread may be reading the listeners.
    install()


def _check_kind(session: type[Any], bind: object, kind: type[Sessionmaker]) -> None:
    """Refuse async sessions, or an async engine, where sync ones are needed, and the reverse."""
    asynchronous = kind is async_sessionmaker
    if issubclass(session, AsyncSession) is not asynchronous:
        raise ConfigurationError(f"the sessions are {session.__name__}s: give session= a plain {kind.__name__}(engine)")
    if isinstance(bind, Engine if asynchronous else AsyncEngine):
        maker = "create_async_engine" if asynchronous else "create_engine"
        raise ConfigurationError(
            f"the {kind.__name__} of session= has an {type(bind).__name__}: give it the engine of {maker}(...)"
        )


def check_same_database(records: URL, bind: object) -> None:
    """Raise ConfigurationError unless sessions on ``bind`` reach the database ``records``, in transactions."""
    other = getattr(bind, "url", records)  # sessions that choose their engine each time cannot be checked
    if (records.get_backend_name(), records.host, records.port, records.database) != (
        other.get_backend_name(),
        other.host,
        other.port,
        other.database,
    ):
        raise ConfigurationError("the sessions are on another database than the store: they cannot commit as one")
    options = bind.get_execution_options() if isinstance(bind, Engine | AsyncEngine) else {}
    if options.get("isolation_level") == "AUTOCOMMIT":
        raise ConfigurationError(COMMITS_BY_ITSELF)


def is_autocommit(connection: Connection) -> bool:
    """Return whether each statement on a connection is committed by itself, as far as is known on the client."""
    level = level_of(connection.dialect, connection.get_execution_options())
    return level == "AUTOCOMMIT" or bool(commits_by_itself(connection))


def options_of(sessions: Sessionmaker) -> dict[str, Any]:
    """Return the execution options of the connections of ``sessions``, as far as they are known before one is made."""
    bind = sessions.kw.get("bind")
    of_engine = {} if bind is None else bind.get_execution_options()
    return {**of_engine, **(sessions.kw.get("execution_options") or {})}


def check_isolation_level(sessions: Sessionmaker) -> None:
    """Raise ConfigurationError for a level under which a session cannot complete a record once its lease was renewed.

    It matters for records that are claimed in one transaction and completed in another.
    """
    engine = sessions.kw.get("bind")
    if engine is None:
        return
    level = level_of(engine.dialect, options_of(sessions))
    if level == "AUTOCOMMIT":
        raise ConfigurationError(COMMITS_BY_ITSELF)
    # The claim is committed first, and its row is renewed while the handler runs: the record could not be completed
    # in a snapshot taken in between. SQLite has no other level. Its transactions do not wait for a writer, and so never
    # see an older row.
    if level in ("REPEATABLE READ", "SERIALIZABLE") and engine.dialect.name != "sqlite":
        raise ConfigurationError(
            f"the sessions are {level}, under which the record cannot be completed once its lease was renewed: give"
            ' session= an engine with isolation_level="READ COMMITTED"'
        )


def as_async(session: Any, verb: str) -> AsyncSession | AsyncConnection:
    """Return the session or connection that ``verb()`` was given; ConfigurationError for one of the other kind."""
    own: Any = session() if isinstance(session, async_scoped_session) else session
    if not isinstance(own, AsyncSession | AsyncConnection):
        kind = type(own).__name__
        raise ConfigurationError(f"{verb}() takes an AsyncSession or AsyncConnection, not {kind}: is it {verb}_sync()?")
    return own


def as_sync(session: Any, verb: str) -> Session | Connection:
    """Return the session or connection that ``verb_sync()`` was given; see :func:`as_async`."""
    own: Any = session() if isinstance(session, scoped_session) else session
    if not isinstance(own, Session | Connection):
        kind = type(own).__name__
        raise ConfigurationError(f"{verb}_sync() takes a Session or Connection, not {kind}: is it await {verb}()?")
    return own


def connection_of(session: Session | Connection, no_transaction: str) -> Connection:
    """Return the connection of a session. Raises TransactionError with this text where none can be begun."""
    if isinstance(session, Connection):
        return session
    try:
        return session.connection()
    except UnboundExecutionError as error:
        raise ConfigurationError(
            "the session has no engine: give it bind=, or give a connection of the effect's engine"
        ) from error
    except InvalidRequestError as error:
        if session.in_transaction():
            raise
        raise TransactionError(no_transaction) from error

"""What the crash kit kills: requests to applications of WSGI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

from idempotency import Policy
from idempotency.errors import OutcomeUnknownError
from idempotency.stores.sql import SQLStore
from idempotency.testing import crash_point
from idempotency.wsgi import IdempotencyMiddleware
from tests.kit.wsgi_calls import call


class Requests:
    """A request is delivered until it has an answer that is not to be retried."""

    # Longer than a request takes on a slow machine, which would be taken over while nothing has killed it.
    policy = Policy(lease=1.0)

    def __init__(self, url: str, directory: str = "") -> None:
        self.engine = create_engine(url)
        self.sessions = sessionmaker(self.engine)
        self.store = SQLStore(self.engine)
        self.directory = Path(directory)
        self.app = IdempotencyMiddleware(self.answer, store=self.store, policy=self.policy, **self.options())

    def options(self) -> dict[str, Any]:
        return {}

    def answer(self, environ: Any, start_response: Any) -> list[bytes]:
        with open(self.directory / environ["idempotency"].key, "ab", buffering=0) as ledger:
            ledger.write(b".")
        crash_point("effect")
        start_response("201 Created", [])
        return [b"done"]

    def prepare(self) -> None:
        self.store.create_schema_sync()

    def deliver(self, key: str) -> None:
        answer = call(self.app, key=key)
        if answer.status != 201 and answer.code != "completed-not-replayable":
            raise OutcomeUnknownError if answer.code == "outcome-unknown" else RuntimeError(answer.code)

    def count(self, key: str) -> int:
        ledger = self.directory / key
        return ledger.stat().st_size if ledger.exists() else 0


class Held(Requests):
    """A request whose outcome is unknown after a crash, until it is resolved by what its ledger says."""

    policy = Policy(lease=1.0, on_crash="hold")

    def resolve(self, key: str) -> None:
        from idempotency._rules import record_id

        record = record_id("http:1:anonymous", key)
        self.store.resolve_sync(record, "done" if self.count(key) else "release")


class Transactional(Requests):
    """A request whose effect commits with its record."""

    def options(self) -> dict[str, Any]:
        return {"session": self.sessions}

    def prepare(self) -> None:
        super().prepare()
        with self.engine.begin() as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS wsgi_effects (what VARCHAR(60))"))

    def answer(self, environ: Any, start_response: Any) -> list[bytes]:
        operation = environ["idempotency"]
        operation.session.execute(text("INSERT INTO wsgi_effects VALUES (:key)"), {"key": operation.key})
        start_response("201 Created", [])
        return [b"done"]

    def count(self, key: str) -> int:
        with self.engine.connect() as connection:
            found: int = connection.execute(
                text("SELECT count(*) FROM wsgi_effects WHERE what = :key"), {"key": key}
            ).scalar_one()
        return found

"""What an operator does with sagas, by their names alone: the code of the application is not needed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from idempotency._results.by_annotation import load
from idempotency._results.codec import encode_failure
from idempotency._sagas.journal import (
    Amend,
    Browse,
    Due,
    Look,
    Purge,
    Put,
    Row,
    Saga,
    Wake,
    saga_id,
)
from idempotency.errors import StoreError, UnreadableError
from idempotency.saga._ask import Journal
from idempotency.saga._facts import Facts, SagaDetail
from idempotency.saga._resolve import Resolution, check_undoable, failing, refused, resolving
from idempotency.saga._run import cancelled_by, head_of
from idempotency.saga._view import SagaState, SagaView, is_run, plain, state_of, step_in, view_of
from idempotency.saga._wait import HELD, digest_of, signal_entry
from idempotency.saga.errors import CancelledByOperatorError, ended_error, missing_error
from idempotency.stores.base import Finding, Store, SyncStore

_EVERY = 1_000_000
"""How many sagas are read where one is looked for by less than its name and key."""

_LATE = 60.0
"""Seconds after which a saga that is due should have been run by a sweeper."""

_COUNTED = 1000
"""How many sagas that are stuck are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaStats:
    """How sagas are as a whole, of those that have not ended; each value may be exported as a gauge.

    ``stuck``: how many do not go on by themselves, 1000 at most. ``oldest_age``: seconds since the oldest began.
    ``late``: for how many seconds the one has been due that should have gone on first. Both are 0 where there is none.
    """

    stuck: int
    oldest_age: float
    late: float


class SagaOperations:
    """See where sagas are and why, and decide about those that do not go on by themselves.

    ``store``: that of the sagas. What an operator changes is fenced: where a process runs the saga, or has run it in
    between, nothing is changed, and :class:`~idempotency.saga.SagaError` says so. The same error is raised where there
    is no such saga, and its subclass :class:`~idempotency.saga.SagaEndedError` where the saga has ended. Every method
    raises :class:`~idempotency.errors.StoreError` where the store fails.
    """

    def __init__(self, store: Store | SyncStore) -> None:
        self._ask = Journal(store, "operating sagas").ask

    async def sagas(
        self, *, name: str | None = None, state: SagaState | None = None, ended: bool = False, limit: int = 100
    ) -> list[SagaView]:
        """List sagas, the oldest first: of this ``name`` and in this ``state``, by default all that have not ended.

        ``ended``: also those that have ended. It is implied by the states ``"done"`` and ``"undone"``.
        """
        ended = ended or state in ("done", "undone")
        browse = Browse(name=name, ended=ended, stuck=state == "stuck", limit=limit)
        return [await self._view(row) for row in await self._rows(browse, lambda row: state in (None, state_of(row)))]

    async def find(self, text: str, *, limit: int = 20) -> list[SagaView]:
        """List the sagas that an operator means by ``text``, ended or not.

        It is ``NAME/KEY``, the 64 hex digits of an id or at least its first 12, or a key alone. The last two read every
        saga of the store.
        """
        names = [(text[:place], text[place + 1 :]) for place, character in enumerate(text) if character == "/"]
        ids = [saga_id(name, key) for name, key in names if name and key]
        digits = text.lower() if len(text) >= 12 and not set(text.lower()) - set("0123456789abcdef") else None
        if digits is not None and len(digits) == 64:
            ids.append(bytes.fromhex(digits))
        found = [saga.row for saga in [await self._ask(Look(id=id)) for id in ids] if saga is not None]
        if not found:
            every = Browse(ended=True, limit=limit)
            found = await self._rows(every, lambda row: row.key == text or _begins(row, digits))
        return [await self._view(row) for row in found]

    async def inspect(self, name: str, key: str, *, show: bool = False) -> SagaDetail | None:
        """Return everything that is recorded of a saga; None where there is none.

        ``show``: also its input, results and the values of signals.
        """
        saga = await self._ask(Look(id=saga_id(name, key)))
        if saga is None:
            return None
        row = saga.row
        return SagaDetail(
            **view_of(row, saga.entries),
            facts=Facts(saga, await self._holders(saga), show).all(),
            input_size=len(row.input),
            result_size=None if row.result is None else len(row.result),
            input=load(row.input) if show and row.input else None,
            result=plain(row.result) if show else None,
        )

    async def retry(self, name: str, key: str) -> None:
        """Let a saga go on at once that waits or is stuck, and forget how often it crashed. A sweeper runs it.

        One that is run now is looked at once more when its run ends.
        """
        saga = await self._going_on(name, key)
        if not await self._ask(Wake(id=saga.row.id)):
            raise ended_error(saga.row.name, saga.row.key)

    async def resolve(
        self, name: str, key: str, step: str, outcome: Resolution, result: object = None, *, by: str = ""
    ) -> None:
        """Tell a saga how a step ended whose outcome is unknown, and let it go on at once.

        ``"done"``: its effect happened, and ``result``, a JSON value, is what its function would have returned.
        ``"not-done"``: it did not happen, and the step is done again, or not undone. A step that failed can be resolved
        after the pivot, and while the saga is undone. ``undo:STEP`` resolves an undo, as done only: it is not tried
        again. ``by``: who resolves it, for the record.
        """
        await self._amend(name, key, lambda saga: resolving(saga, step, outcome, result, by))

    async def compensate(self, name: str, key: str) -> None:
        """Fail a saga, and let it be undone: its function is not run any more.

        Refused once its pivot is done, or begun with an unknown outcome.
        """
        failure = encode_failure(CancelledByOperatorError("An operator has failed the saga."))
        await self._amend(name, key, lambda saga: failing(saga, failure))

    async def cancel(self, name: str, key: str, *, by: str = "") -> None:
        """Cancel a saga: its next step raises CancelledByOperatorError instead, also while a process runs it.

        Refused as by :meth:`compensate`. If the pivot is done meanwhile, the saga goes on.
        """
        saga = await self._going_on(name, key)
        check_undoable(saga)
        if await self._ask(Put(id=saga.row.id, entry=cancelled_by(by))) is None:
            raise ended_error(saga.row.name, saga.row.key)

    async def signal(
        self, name: str, key: str, signal: str, value: object = None, *, by: str = "", about: object = None
    ) -> bool:
        """Give a saga a signal, also before it waits for it; False if it had one of this name. See `AsyncSaga.signal`.

        Refused if the saga waits for it about something else than ``about``.
        """
        saga = await self._going_on(name, key)
        for entry in saga.entries:
            if entry.name == f"wait:{signal}" and head_of(entry)["about"] != digest_of(about):
                raise refused(saga, f"waits for the signal {signal} about something else")
        given = signal_entry(signal, value, by, about)
        found = await self._ask(Put(id=saga.row.id, entry=given))
        if found is None:
            raise ended_error(saga.row.name, saga.row.key)
        return found.body == given.body

    async def purge(self, batch: int = 1000) -> int:
        """Delete up to ``batch`` sagas that have expired, and return how many; 0 where the server does so itself."""
        return await self._ask(Purge(batch=batch))

    async def stats(self) -> SagaStats:
        """Count the sagas that are stuck, and find how old the oldest is, and how late: three short requests."""
        stuck = await self._ask(Browse(stuck=True, limit=_COUNTED))
        oldest = await self._rows(Browse(limit=1), lambda row: True)
        due = await self._ask(Due(limit=1))
        return SagaStats(
            stuck=sum(row.name != HELD for row in stuck),
            oldest_age=max(0.0, oldest[0].age) if oldest else 0.0,
            late=max(0.0, -(due[0].due_in or 0.0)) if due else 0.0,
        )

    async def examine(self) -> list[Finding]:
        """Return what an operator should know of the sagas: which are stuck, and which nobody runs.

        Empty where there are none.
        """
        try:
            if not await self._ask(Browse(ended=True, limit=1)):
                return []
            stuck = await self._ask(Browse(stuck=True, limit=_COUNTED))
            due = await self._ask(Due(limit=1))
        except StoreError as error:
            return [Finding("fix", str(error))]
        findings: list[Finding] = []
        if stuck:
            many = "or more" if len(stuck) == _COUNTED else ""
            findings.append(
                Finding("note", f"sagas that are stuck: {len(stuck)}{many}; idempotency saga list --state stuck")
            )
        late = -(due[0].due_in or 0.0) if due else 0.0
        if late > _LATE:
            what = f"the saga {due[0].name} has been due for {late:.0f} s: no sweeper runs it, or too few do"
            findings.append(Finding("fix", what))
        return findings or [Finding("ok", "sagas: none is stuck, and none is late")]

    async def _rows(self, browse: Browse, accept: Callable[[Row], bool]) -> list[Row]:
        size = browse.limit
        while True:
            rows = await self._ask(replace(browse, limit=size))
            # Resources that are held are recorded as sagas too.
            found = [row for row in rows if row.name != HELD and accept(row)]
            if len(found) >= browse.limit or len(rows) < size or size >= _EVERY:
                return found[: browse.limit]
            size = min(size * 10, _EVERY)

    async def _view(self, row: Row) -> SagaView:
        """Return the view of a saga, which is looked at once more where only its entries tell its step."""
        saga: Saga | None = None
        if row.attempt and not row.phase.ended and not step_in(row):
            with suppress(UnreadableError):
                saga = await self._ask(Look(id=row.id))
        return SagaView(**(view_of(row) if saga is None else view_of(saga.row, saga.entries)))

    async def _going_on(self, name: str, key: str) -> Saga:
        saga = await self._ask(Look(id=saga_id(name, key)))
        if saga is None:
            raise missing_error(name, key)
        if saga.row.phase.ended:
            raise ended_error(saga.row.name, saga.row.key)
        return saga

    async def _amend(self, name: str, key: str, request: Callable[[Saga], Amend]) -> None:
        saga = await self._going_on(name, key)
        if is_run(saga.row):
            raise refused(saga, "is run by a process now")
        if not await self._ask(request(saga)):
            raise refused(saga, "was run by a process meanwhile")

    async def _holders(self, saga: Saga) -> dict[str, str]:
        resources = [entry.name.removeprefix("hold:") for entry in saga.entries if entry.name.startswith("hold:")]
        holders: dict[str, str] = {}
        for resource in resources:
            held = await self._ask(Look(id=saga_id(HELD, resource.partition("#")[0])))
            if held is not None and is_run(held.row):
                name, key = load(held.row.input)
                holders[resource] = "" if (name, key) == (saga.row.name, saga.row.key) else f"{name}/{key}"
        return holders


def _begins(row: Row, digits: str | None) -> bool:
    return digits is not None and row.id.hex().startswith(digits)

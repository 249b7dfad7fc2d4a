"""The contract of Open."""

from __future__ import annotations

import asyncio

import pytest

from idempotency._sagas.journal import FORMAT, Look, Phase, Row, Saga
from idempotency.testing.journal._journal import (
    BYTES,
    LEASE,
    NAMES,
    OTHER,
    SHORT,
    Contract,
    Journal,
    begun,
    by_name,
    done,
    ending,
    leave,
    new_name,
    opening,
    rival,
    write,
)

KEYS = {
    "colon": "a:b",
    "braces": "{a}b}",
    "quotes": "'\"`;--\\",
    "white space": " a\tb\r\n ",
    "control": "\x00\x01\x1f\x7f",
    "accents": "cl\u00e9 \u043a\u043b\u044e\u0447 \u9375 \U0001f511",
    "lone surrogate": "\ud800",
    "empty": "",
    "long": "k" * 4000,
}


class OpenContract(Contract):
    """Check who owns a saga, and what is recorded of a new one."""

    async def test_absent_is_recorded_and_owned(self, journal: Journal) -> None:
        """A new saga is owned for its lease, and has what was given."""
        request = opening(deadline=100.0)

        saga = await journal(request)

        assert saga is not None
        row = saga.row
        assert row.due_in is not None
        assert row.deadline_in is not None
        assert 0 < row.due_in <= 30
        assert 90 < row.deadline_in <= 100
        assert 0 <= row.age < 10
        assert saga == Saga(
            Row(
                id=request.id,
                name=request.name,
                key="key",
                phase=Phase.FORWARD,
                token=request.token,
                fingerprint=request.fingerprint,
                input=b"input",
                attempt=1,
                crashes=0,
                wakes=0,
                reason=b"",
                result=None,
                due_in=row.due_in,
                deadline_in=row.deadline_in,
                age=row.age,
                version=FORMAT,
            )
        )

    async def test_absent_without_an_input_is_none(self, journal: Journal) -> None:
        """Without an input nothing is recorded."""
        request = opening(input=None)

        assert await journal(request) is None
        assert await journal(Look(id=request.id)) is None

    @pytest.mark.parametrize("given", BYTES.values(), ids=BYTES.keys())
    async def test_any_input(self, journal: Journal, given: bytes) -> None:
        """An input comes back byte for byte."""
        request = opening(input=given)
        await journal.owned(request)

        assert (await journal.row(request)).input == given

    @pytest.mark.parametrize("key", KEYS.values(), ids=KEYS.keys())
    async def test_any_key(self, journal: Journal, key: str) -> None:
        """The whole key comes back: a run needs it."""
        request = opening(key=key)
        await journal.owned(request)

        assert (await journal.row(request)).key == key

    @pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
    async def test_any_name_of_a_saga(self, journal: Journal, name: str) -> None:
        """A name comes back as it was given."""
        request = opening(name=f"{new_name()} {name}")
        await journal.owned(request)

        assert (await journal.row(request)).name == request.name

    async def test_lease_of_0_records_only(self, journal: Journal) -> None:
        """A saga that is only recorded has no owner, is due at once, and has had no run."""
        request = opening(lease=0.0)

        saga = await journal(request)

        assert saga is not None
        assert (saga.row.token, saga.row.attempt, saga.row.crashes, saga.entries) == ("", 0, 0, ())
        assert saga.row.due_in is not None
        assert saga.row.due_in <= 0
        row = await journal.owned(rival(request, input=None))
        assert (row.attempt, row.crashes, row.input) == (1, 0, b"input")

    async def test_lease_of_0_leaves_what_is_there(self, journal: Journal) -> None:
        """A saga that is there is not owned by a lease of 0: not one that runs, and not one that is due."""
        running, due = opening(), opening()
        await journal.owned(running)
        await journal.owned(due)
        await journal(leave(due, due=0.0))

        first, second = await journal(rival(running, lease=0.0)), await journal(rival(due, lease=0.0))

        assert first is not None
        assert (first.row.token, first.row.attempt) == (running.token, 1)
        assert second is not None
        assert (second.row.token, second.row.attempt) == ("", 1)

    async def test_owned_is_not_owned_by_another(self, journal: Journal, other_journal: Journal) -> None:
        """Another process gets the row, with the token and the rest of the lease of its owner, and no entries."""
        request = opening()
        await journal.owned(request)
        await journal(write(request, done()))

        for other in (rival(request), rival(request, input=None)):
            saga = await other_journal(other)

            assert saga is not None
            assert (saga.row.token, saga.row.attempt, saga.row.crashes) == (request.token, 1, 0)
            assert saga.row.due_in is not None
            assert 0 < saga.row.due_in <= 30
            assert saga.entries == ()

    async def test_owner_opens_again(self, journal: Journal) -> None:
        """An owner whose answer was lost gets it again, with the entries. It is no new run; the lease begins anew."""
        request = await journal.lapsed()
        for lease in (LEASE, SHORT):
            await journal(write(request, done(), lease=lease))
            if lease == SHORT:
                await journal.over(request)

            saga = await journal(rival(request, token=request.token))

            assert saga is not None
            assert (saga.row.token, saga.row.attempt, saga.row.crashes) == (request.token, 1, 0)
            assert by_name(saga) == {"step": done()}
        row = await journal.row(request)
        assert row.due_in is not None
        assert row.due_in > SHORT

    async def test_lapsed_is_taken_over(self, journal: Journal, other_journal: Journal) -> None:
        """Once the lease is over another process owns the saga with its entries; runs and crashes are counted."""
        request = await journal.lapsed()
        await journal(write(request, begun("first"), done("second"), lease=SHORT))
        await journal.over(request)
        second = rival(request, lease=SHORT)

        saga = await other_journal(second)

        assert saga is not None
        assert (saga.row.token, saga.row.attempt, saga.row.crashes) == (second.token, 2, 1)
        assert by_name(saga) == {"first": begun("first"), "second": done("second")}
        await journal.over(request)
        third = await journal.owned(rival(request))
        assert (third.attempt, third.crashes) == (3, 2)

    async def test_what_waits_is_owned_when_it_is_due(self, journal: Journal) -> None:
        """A saga that waits is owned once its wait is over: a new run, and no crash."""
        request = opening()
        await journal.owned(request)
        await journal(leave(request, due=SHORT))

        early = await journal(rival(request))
        await journal.over(request)
        row = await journal.owned(rival(request))

        assert early is not None
        assert (early.row.token, early.row.attempt) == ("", 1)
        assert (row.attempt, row.crashes) == (2, 0)

    async def test_what_is_never_due_is_not_owned(self, journal: Journal) -> None:
        """A stuck saga is owned by nobody, whether an input is given or not."""
        request = opening()
        await journal.owned(request)
        await journal(leave(request, due=None))

        for other in (rival(request), rival(request, input=None)):
            saga = await journal(other)
            assert saga is not None
            assert (saga.row.token, saga.row.due_in, saga.row.attempt) == ("", None, 1)

    async def test_another_input_owns_nothing(self, journal: Journal) -> None:
        """A saga is not owned with another fingerprint, also when it is due; without an input it is not compared."""
        request = await journal.lapsed()

        other = await journal(rival(request, fingerprint=OTHER))

        assert other is not None
        assert (other.row.token, other.row.attempt) == (request.token, 1)
        assert other.row.fingerprint == request.fingerprint
        assert (await journal.owned(rival(request, fingerprint=OTHER, input=None))).attempt == 2

    async def test_a_new_owner_changes_nothing_that_was_given(self, journal: Journal) -> None:
        """Fingerprint, input, deadline and phase are those of the first record, and the age counts from it."""
        request = await journal.lapsed(deadline=100.0)
        await journal(write(request, phase=Phase.UNDOING, lease=0.0))

        row = await journal.owned(rival(request, input=b"other", deadline=1000.0))

        assert (row.input, row.fingerprint, row.phase) == (b"input", request.fingerprint, Phase.UNDOING)
        assert row.deadline_in is not None
        assert row.deadline_in <= 100 - SHORT
        assert SHORT <= row.age < 60

    async def test_without_a_deadline(self, journal: Journal) -> None:
        """A saga without a deadline has none, whatever its next owner says."""
        request = opening(lease=0.0)
        await journal(request)

        assert (await journal.owned(rival(request, deadline=5.0))).deadline_in is None

    async def test_ended_is_not_owned(self, journal: Journal) -> None:
        """Of a saga that has ended everyone gets the row with the result, and nobody owns it."""
        request = opening()
        await journal.owned(request)
        await journal(ending(request, done()))

        for other in (rival(request), rival(request, input=None), request):
            saga = await journal(other)
            assert saga is not None
            assert (saga.row.token, saga.row.phase, saga.row.result) == ("", Phase.DONE, b"result")
            assert (saga.row.due_in, saga.row.attempt, saga.entries) == (None, 1, ())

    async def test_expired_is_absent(self, journal: Journal) -> None:
        """An expired saga is recorded anew, without its entries and results; without an input it is absent."""
        request = opening(deadline=100.0)
        await journal.owned(request)
        await journal(ending(request, done(), ttl=SHORT))
        await journal.expired(request)

        assert await journal(rival(request, input=None)) is None
        row = await journal.owned(rival(request, fingerprint=OTHER, input=b"new", deadline=None))
        assert (row.input, row.fingerprint, row.attempt) == (b"new", OTHER, 1)
        assert (row.phase, row.result, row.deadline_in) == (Phase.FORWARD, None, None)
        assert await journal.entries(request) == {}

    async def test_one_owner_of_many(self, journal: Journal, other_journal: Journal) -> None:
        """Of twenty processes that open a new saga at once one owns it, and the others get its row."""
        requests = [opening()]
        requests += [rival(requests[0]) for _ in range(19)]

        sagas = await asyncio.gather(
            *((journal, other_journal)[number % 2](request) for number, request in enumerate(requests))
        )

        assert len({saga.row.token for saga in sagas if saga is not None}) == 1
        assert [saga.row.attempt for saga in sagas if saga is not None] == [1] * 20

    async def test_one_successor_of_many(self, journal: Journal, other_journal: Journal) -> None:
        """Of twenty processes that open an abandoned saga at once one takes over, and the others get its row."""
        request = await journal.lapsed()
        requests = [rival(request) for _ in range(20)]

        sagas = await asyncio.gather(
            *((journal, other_journal)[number % 2](request) for number, request in enumerate(requests))
        )

        assert len({saga.row.token for saga in sagas if saga is not None}) == 1
        assert [(saga.row.attempt, saga.row.crashes) for saga in sagas if saga is not None] == [(2, 1)] * 20

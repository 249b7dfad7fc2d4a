"""The contract of Leave."""

from __future__ import annotations

import pytest

from idempotency._sagas.journal import Amend, Look, Phase, Put, Wake
from idempotency.testing.journal._journal import (
    LEASE,
    SHORT,
    Contract,
    Journal,
    begun,
    done,
    ending,
    leave,
    opening,
    rival,
    write,
)


class LeaveContract(Contract):
    """Check how a run ends: the saga waits, is stuck, or has ended."""

    async def test_waits(self, journal: Journal) -> None:
        """A saga that waits has no owner, is due after its wait, and says what for."""
        request = opening()
        await journal.owned(request)
        await journal(write(request, begun(), result=b"failure"))

        assert await journal(leave(request, done(), phase=Phase.UNDOING, due=20.0, reason=b"\x00why"))

        row = await journal.row(request)
        assert (row.token, row.phase, row.reason, row.result) == ("", Phase.UNDOING, b"\x00why", b"failure")
        assert (row.attempt, row.crashes, row.wakes) == (1, 0, 0)
        assert row.due_in is not None
        assert 10 < row.due_in <= 20
        assert await journal.entries(request) == {"step": done()}

    async def test_the_reason_is_that_of_the_last_run(self, journal: Journal) -> None:
        """A reason stays while the next run goes on, and is replaced at its end, also by none."""
        request = opening()
        await journal.owned(request)
        await journal(leave(request, reason=b"first", due=0.0))
        second = rival(request)
        during = await journal.owned(second)
        await journal(leave(second))

        assert during.reason == b"first"
        assert (await journal.row(request)).reason == b""

    async def test_due_at_once(self, journal: Journal) -> None:
        """A wait of 0 is over."""
        request = opening()
        await journal.owned(request)
        await journal(leave(request, due=0.0))

        row = await journal.row(request)
        assert row.due_in is not None
        assert row.due_in <= 0

    async def test_never_due(self, journal: Journal) -> None:
        """A saga that is never due is stuck, and does not expire."""
        request = opening()
        await journal.owned(request)
        await journal(leave(request, due=None, ttl=SHORT, reason=b"stuck"))
        await journal.pause(2 * SHORT)

        row = await journal.row(request)
        assert (row.due_in, row.token, row.phase, row.reason) == (None, "", Phase.FORWARD, b"stuck")

    @pytest.mark.parametrize("due", [20.0, None])
    async def test_what_came_meanwhile_makes_it_due_at_once(self, journal: Journal, due: float | None) -> None:
        """A signal that came while the run ended is not missed, however long the saga would wait."""
        request = opening()
        await journal.owned(request)
        await journal(Put(id=request.id, entry=done("signal")))
        await journal(leave(request, due=due, wakes=0))

        row = await journal.owned(rival(request))
        assert (row.attempt, row.wakes) == (2, 1)

    async def test_what_came_before_does_not(self, journal: Journal) -> None:
        """A signal that the run has seen does not make the saga due."""
        request = opening()
        await journal.owned(request)
        await journal(Put(id=request.id, entry=done("signal")))
        await journal(leave(request, due=20.0, wakes=1))

        row = await journal.row(request)
        assert row.due_in is not None
        assert row.due_in > 10

    async def test_ended(self, journal: Journal) -> None:
        """A saga that has ended is never due, whatever came meanwhile, and has its result and entries."""
        request = opening()
        await journal.owned(request)
        await journal(write(request, done("first"), result=b"failure"))
        await journal(Wake(id=request.id))

        assert await journal(ending(request, done("last"), phase=Phase.UNDONE, due=20.0))

        row = await journal.row(request)
        assert (row.phase, row.result, row.due_in, row.token) == (Phase.UNDONE, b"result", None, "")
        assert await journal.entries(request) == {"first": done("first"), "last": done("last")}

    async def test_ended_keeps_the_result_that_was_written(self, journal: Journal) -> None:
        """Without a result the one that was written stays, and none is not an empty one."""
        written, empty, none = opening(), opening(), opening()
        for request in (written, empty, none):
            await journal.owned(request)
        await journal(write(written, result=b"failure"))
        await journal(ending(written, phase=Phase.UNDONE, result=None))
        await journal(ending(empty, result=b""))
        await journal(ending(none, result=None))

        results = [(await journal.row(request)).result for request in (written, empty, none)]
        assert results == [b"failure", b"", None]

    async def test_ended_expires(self, journal: Journal) -> None:
        """An ended saga is there for its ttl, and absent then."""
        request = opening()
        await journal.owned(request)
        await journal(ending(request, done(), ttl=2 * SHORT))
        before = await journal(Look(id=request.id))
        await journal.pause(2 * SHORT)

        assert before is not None
        await journal.expired(request)

    async def test_crashes_begin_anew(self, journal: Journal) -> None:
        """A run that ends with a word is no crash, and those before it are forgotten."""
        request = await journal.lapsed()
        second = rival(request)
        crashes = (await journal.owned(second)).crashes
        await journal(leave(second, due=0.0))

        assert crashes == 1
        assert (await journal.owned(rival(request))).crashes == 0

    async def test_after_the_lease(self, journal: Journal) -> None:
        """A lease that is over does not matter as long as nobody took over."""
        request = await journal.lapsed()

        assert await journal(ending(request))
        assert (await journal.row(request)).phase is Phase.DONE

    async def test_leave_repeated(self, journal: Journal) -> None:
        """Repeated after it succeeded it answers True and changes nothing: not what came from outside since then."""
        waiting, ended = opening(), opening()
        await journal.owned(waiting)
        await journal.owned(ended)
        first, last = leave(waiting, done()), ending(ended, done())

        assert [await journal(request) for request in (first, last)] == [True, True]
        await journal.pause(SHORT)
        assert [await journal(request) for request in (first, last)] == [True, True]

        row = await journal.row(waiting)
        assert row.due_in is not None
        assert row.due_in <= LEASE - SHORT
        assert (await journal.row(ended)).phase is Phase.DONE
        await journal(Put(id=waiting.id, entry=done("signal")))
        assert await journal(first)
        await journal.owned(rival(waiting))

    async def test_superseded_owner_cannot_leave(self, journal: Journal, other_journal: Journal) -> None:
        """An owner that another one took over from cannot end the run of its successor, nor undo how that ended."""
        superseded = await journal.lapsed()
        owner = rival(superseded)
        await other_journal.owned(owner)

        assert not await journal(ending(superseded, done()))
        assert not await journal(leave(superseded, done(), reason=b"late"))
        row = await journal.row(owner)
        assert (row.token, row.phase, row.reason, row.result) == (owner.token, Phase.FORWARD, b"", None)
        await other_journal(leave(owner))
        assert not await journal(leave(superseded, done(), due=0.0))
        assert await journal.entries(owner) == {}

    async def test_repeated_after_the_next_run(self, journal: Journal) -> None:
        """Once another one has owned the saga, the end of the run before it is False, and changes nothing."""
        request = opening()
        await journal.owned(request)
        first = leave(request, done(), due=0.0)
        await journal(first)
        second = rival(request)
        await journal.owned(second)

        assert not await journal(first)
        assert (await journal.row(request)).token == second.token
        await journal(leave(second))
        assert not await journal(first)

    async def test_who_never_owned_it_cannot_leave(self, journal: Journal) -> None:
        """Neither a stranger, nor who only recorded it, nor the owner of an absent saga."""
        running, recorded, absent = opening(), opening(lease=0.0), opening()
        await journal.owned(running)
        await journal(recorded)

        for request in (rival(running), recorded, absent):
            assert not await journal(ending(request))

        assert (await journal.row(running)).token == running.token
        assert (await journal.row(recorded)).phase is Phase.FORWARD

    async def test_after_an_amendment(self, journal: Journal) -> None:
        """An owner whose lease was over, and whose saga an operator has changed, is not its owner any more."""
        request = await journal.lapsed()
        await journal(Amend(id=request.id))

        assert not await journal(ending(request))
        assert await journal(write(request)) is None
        assert (await journal.row(request)).phase is Phase.FORWARD

"""The contract of Put and Wake."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from idempotency._sagas.journal import Due, Entry, Phase, Progress, Put, Wake
from idempotency.testing.journal._journal import (
    SHORT,
    Contract,
    Journal,
    begun,
    done,
    ending,
    leave,
    new_name,
    opening,
    rival,
    write,
)

SIGNAL = Entry(name="signal:paid", progress=Progress.DONE, attempt=2, body=b"\x00signal")


class SignalContract(Contract):
    """Check what comes from outside."""

    @pytest.mark.parametrize("due", [20.0, None])
    async def test_the_first_one_is_written(self, journal: Journal, due: float | None) -> None:
        """A signal is written, and makes a saga that waits, or is stuck, due at once."""
        request = opening()
        await journal.owned(request)
        await journal(leave(request, due=due, reason=b"waits"))

        found = await journal(Put(id=request.id, entry=SIGNAL))

        assert found is not None
        assert 0 <= found.began < 10
        assert 0 <= found.changed < 10
        assert replace(found, began=0.0, changed=0.0) == SIGNAL
        assert await journal.entries(request) == {SIGNAL.name: SIGNAL}
        row = await journal.owned(rival(request))
        assert (row.wakes, row.reason, row.crashes) == (1, b"waits", 0)

    async def test_the_second_one_gets_the_first(self, journal: Journal) -> None:
        """Another one, and the same one again, change nothing: the answer is the first, with its times."""
        request = opening()
        await journal.owned(request)
        await journal(Put(id=request.id, entry=SIGNAL))
        await journal.pause(SHORT)

        for entry in (SIGNAL, replace(SIGNAL, body=b"second", progress=Progress.FAILED)):
            found = await journal(Put(id=request.id, entry=entry))
            assert found is not None
            assert SHORT <= found.changed == found.began < 60
            assert replace(found, began=0.0, changed=0.0) == SIGNAL

        assert (await journal.row(request)).wakes == 1

    async def test_what_the_owner_wrote_is_there(self, journal: Journal) -> None:
        """An entry that the owner wrote under this name is returned, and nothing is counted."""
        request = opening()
        await journal.owned(request)
        await journal(write(request, begun("timer")))

        found = await journal(Put(id=request.id, entry=done("timer")))

        assert found is not None
        assert (found.progress, found.body) == (Progress.BEGUN, b"begun")
        assert (await journal.row(request)).wakes == 0

    async def test_one_of_many(self, journal: Journal, other_journal: Journal) -> None:
        """Of twenty signals at once one is written, and all get it as their answer."""
        request = opening()
        await journal.owned(request)
        entries = [replace(SIGNAL, body=b"%d" % number) for number in range(20)]

        found = await asyncio.gather(
            *((journal, other_journal)[at % 2](Put(id=request.id, entry=entry)) for at, entry in enumerate(entries))
        )

        bodies = {each.body for each in found if each is not None}
        assert len(bodies) == 1
        assert [each is None for each in found] == [False] * 20
        assert {entry.body for entry in (await journal.entries(request)).values()} == bodies
        assert (await journal.row(request)).wakes == 1

    async def test_an_owner_runs_on(self, journal: Journal) -> None:
        """A signal, or a wake, does not take the saga from its owner, and its lease is as long as before."""
        request = opening()
        await journal.owned(request)
        await journal(Put(id=request.id, entry=SIGNAL))
        await journal(Wake(id=request.id))

        row = await journal.row(request)
        assert (row.token, row.wakes) == (request.token, 2)
        assert row.due_in is not None
        assert row.due_in > 10
        assert await journal(write(request, done())) == 2
        assert await journal.entries(request) == {SIGNAL.name: SIGNAL, "step": done()}

    async def test_a_signal_before_the_first_run(self, journal: Journal) -> None:
        """A saga that is only recorded takes signals."""
        request = opening(lease=0.0)
        await journal(request)
        await journal(Put(id=request.id, entry=SIGNAL))

        row = await journal.owned(rival(request))
        assert (row.attempt, row.wakes) == (1, 1)
        assert await journal.entries(request) == {SIGNAL.name: SIGNAL}

    async def test_absent_or_ended_takes_nothing(self, journal: Journal) -> None:
        """A saga that is not there, has ended or has expired takes neither signals nor wakes."""
        absent, ended, expired = opening(), opening(), opening()
        await journal.owned(ended)
        await journal.owned(expired)
        await journal(ending(ended))
        await journal(ending(expired, phase=Phase.UNDONE, ttl=SHORT))
        await journal.expired(expired)

        for request in (absent, ended, expired):
            assert await journal(Put(id=request.id, entry=SIGNAL)) is None
            assert await journal(Wake(id=request.id)) is False

        row = await journal.row(ended)
        assert (row.wakes, row.due_in) == (0, None)
        assert await journal.entries(ended) == {}

    @pytest.mark.parametrize("due", [20.0, None])
    async def test_wake(self, journal: Journal, due: float | None) -> None:
        """An operator makes a saga that waits, or is stuck, due at once."""
        request = opening()
        await journal.owned(request)
        await journal(leave(request, due=due))

        assert await journal(Wake(id=request.id)) is True

        row = await journal.owned(rival(request))
        assert (row.wakes, row.attempt) == (1, 2)

    async def test_wake_forgets_the_crashes(self, journal: Journal) -> None:
        """Crashes are forgotten where no owner runs; the next take-over from an owner that vanished is the first."""
        request = await journal.lapsed()
        second = rival(request, lease=SHORT)
        await journal.owned(second)
        await journal(Wake(id=request.id))
        running = await journal.row(request)
        await journal.over(request)
        await journal(Wake(id=request.id))
        lapsed = await journal.row(request)

        assert (running.crashes, running.token) == (1, second.token)
        assert (lapsed.crashes, lapsed.wakes) == (0, 2)
        assert (await journal.owned(rival(request))).crashes == 1

    async def test_what_is_due_keeps_its_place(self, journal: Journal) -> None:
        """A saga that is due already stays due since the same time, however often something comes."""
        name = new_name()
        requests = [opening(name, key, lease=0.0) for key in ("first", "second", "third")]
        for request in requests:
            await journal(request)
            await journal.pause(0.02)
        await journal(Put(id=requests[0].id, entry=SIGNAL))
        await journal(Wake(id=requests[1].id))

        assert [row.key for row in await journal(Due(names=[name]))] == ["first", "second", "third"]

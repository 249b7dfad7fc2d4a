"""The contract of Write."""

from __future__ import annotations

import asyncio

import pytest

from idempotency._sagas.journal import Entry, Look, Phase, Progress, Put, Wake
from idempotency.testing.journal._journal import (
    BYTES,
    LEASE,
    NAMES,
    SHORT,
    TWINS,
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


class WriteContract(Contract):
    """Check what an owner writes, and that only the owner can."""

    async def test_entries_come_back(self, journal: Journal) -> None:
        """Each entry comes back with all that was written, under its name."""
        request = opening()
        await journal.owned(request)
        entries = (
            Entry(name="one", progress=Progress.BEGUN, attempt=3, body=b"1"),
            Entry(name="two", progress=Progress.DONE, order=1),
            Entry(name="three", progress=Progress.FAILED, order=2, attempt=70_000, body=b"3"),
            Entry(name="four", progress=Progress.SKIPPED, order=70_000),
        )

        assert await journal(write(request, *entries)) == 0

        assert await journal.entries(request) == {entry.name: entry for entry in entries}

    @pytest.mark.parametrize("body", BYTES.values(), ids=BYTES.keys())
    async def test_any_body(self, journal: Journal, body: bytes) -> None:
        """A body and a result come back byte for byte."""
        request = opening()
        await journal.owned(request)
        await journal(write(request, done(body=body), result=body))

        assert await journal.entries(request) == {"step": done(body=body)}
        assert (await journal.row(request)).result == body

    @pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
    async def test_any_name(self, journal: Journal, name: str) -> None:
        """The name of an entry comes back as it was given, and the entry is found under it."""
        request = opening()
        await journal.owned(request)
        await journal(write(request, begun(name)))
        await journal(write(request, done(name)))

        assert await journal.entries(request) == {name: done(name)}

    async def test_names_are_compared_exactly(self, journal: Journal) -> None:
        """Names that differ in case, a space at the end, an accent or a normal form are different entries."""
        request = opening()
        await journal.owned(request)
        await journal(write(request, *(begun(name, name.encode()) for name in TWINS)))

        assert await journal.entries(request) == {name: begun(name, name.encode()) for name in TWINS}

    async def test_an_entry_is_replaced(self, journal: Journal) -> None:
        """An entry of the same name is replaced, whole; the others stay, and it began when it was first written."""
        request = opening()
        await journal.owned(request)
        await journal(write(request, begun("one", attempt=2), begun("two")))
        await journal.pause(SHORT)
        await journal(write(request, done("one")))

        saga = await journal(Look(id=request.id))

        assert await journal.entries(request) == {"one": done("one"), "two": begun("two")}
        assert saga is not None
        times = {entry.name: (entry.began, entry.changed) for entry in saga.entries}
        assert 0 <= times["one"][1] < SHORT <= times["one"][0] < 60
        assert SHORT <= times["two"][1] == times["two"][0] < 60

    async def test_the_lease_begins_anew(self, journal: Journal) -> None:
        """Each write starts the lease anew, also without entries, and also when the lease is over."""
        request = await journal.lapsed()

        assert await journal(write(request)) == 0

        row = await journal.row(request)
        assert row.due_in is not None
        assert 10 < row.due_in <= 30
        assert (row.token, row.attempt, row.crashes) == (request.token, 1, 0)
        assert await journal(write(request, done(), lease=100.0)) == 0
        row = await journal.row(request)
        assert row.due_in is not None
        assert 90 < row.due_in <= 100

    async def test_a_lease_of_0_is_over_at_once(self, journal: Journal) -> None:
        """A write may end the lease."""
        request = opening()
        await journal.owned(request)
        await journal(write(request, done(), lease=0.0))

        assert (await journal.owned(rival(request))).attempt == 2

    async def test_what_came_from_outside_is_counted(self, journal: Journal) -> None:
        """The answer says how often something came from outside."""
        request = opening()
        await journal.owned(request)
        answers = [await journal(write(request))]
        await journal(Put(id=request.id, entry=done("signal")))
        answers.append(await journal(write(request, done())))
        await journal(Wake(id=request.id))
        answers.append(await journal(write(request)))

        assert answers == [0, 1, 2]
        assert (await journal.row(request)).wakes == 2

    async def test_phase_and_result(self, journal: Journal) -> None:
        """They are changed if they are given; an empty result is a result."""
        request = opening()
        await journal.owned(request)
        rows = []
        for changes in ({}, {"phase": Phase.UNDOING}, {"result": b""}, {"result": b"failure"}, {}):
            await journal(write(request, **changes))
            rows.append(await journal.row(request))

        assert [(row.phase, row.result) for row in rows] == [
            (Phase.FORWARD, None),
            (Phase.UNDOING, None),
            (Phase.UNDOING, b""),
            (Phase.UNDOING, b"failure"),
            (Phase.UNDOING, b"failure"),
        ]

    async def test_progress_forgets_the_crashes(self, journal: Journal) -> None:
        """Crashes are counted from the last progress; a write without progress does not matter."""
        request = await journal.lapsed()
        second = rival(request)
        await journal.owned(second)
        await journal(write(second, begun()))
        before = (await journal.row(request)).crashes
        await journal(write(second, done(), progress=True))
        after = (await journal.row(request)).crashes
        await journal(write(second, lease=0.0))

        assert (before, after) == (1, 0)
        assert (await journal.owned(rival(request))).crashes == 1

    async def test_write_repeated(self, journal: Journal) -> None:
        """A write whose answer was lost may be sent again."""
        request = opening()
        await journal.owned(request)
        written = write(request, done(), begun("next"), progress=True, phase=Phase.UNDOING, result=b"failure")

        assert await journal(written) == 0
        assert await journal(written) == 0
        row = await journal.row(request)
        assert (row.phase, row.result, row.wakes, row.attempt) == (Phase.UNDOING, b"failure", 0, 1)
        assert await journal.entries(request) == {"step": done(), "next": begun("next")}

    async def test_superseded_owner_writes_nothing(self, journal: Journal, other_journal: Journal) -> None:
        """An owner that another one took over from changes nothing by trying."""
        superseded = await journal.lapsed()
        await journal(write(superseded, begun(), lease=SHORT))
        await journal.over(superseded)
        owner = rival(superseded)
        await other_journal.owned(owner)
        late = write(
            superseded, done(), done("other"), lease=1000.0, progress=True, phase=Phase.UNDOING, result=b"late"
        )

        assert await journal(late) is None

        row = await journal.row(owner)
        assert (row.token, row.phase, row.result, row.crashes) == (owner.token, Phase.FORWARD, None, 1)
        assert row.due_in is not None
        assert row.due_in <= LEASE
        assert await journal.entries(owner) == {"step": begun()}

    async def test_who_does_not_own_it_writes_nothing(self, journal: Journal) -> None:
        """A stranger does not, nor an owner whose run has ended, and nothing is written to an absent saga."""
        running, waiting, ended, absent = opening(), opening(), opening(), opening()
        for request in (running, waiting, ended):
            await journal.owned(request)
        await journal(leave(waiting))
        await journal(ending(ended))

        for request in (rival(running), waiting, ended, absent):
            assert await journal(write(request, done(), result=b"stranger")) is None

        assert [await journal.entries(request) for request in (running, waiting, ended)] == [{}, {}, {}]
        assert [(await journal.row(request)).result for request in (running, waiting, ended)] == [None, None, b"result"]
        assert await journal(Look(id=absent.id)) is None

    async def test_a_saga_that_is_only_recorded_is_written_by_nobody(self, journal: Journal) -> None:
        """Who recorded it is not its owner."""
        request = opening(lease=0.0)
        await journal(request)

        assert await journal(write(request, done())) is None
        assert await journal.entries(request) == {}

    async def test_late_write_or_successor(self, journal: Journal, other_journal: Journal) -> None:
        """A late write and a take-over at once: one of them happens, and the other one gets that as its answer."""
        for _ in range(5):
            late = await journal.lapsed()
            owner = rival(late)

            written, saga = await asyncio.gather(journal(write(late, done())), other_journal(owner))

            assert saga is not None
            if written is None:
                assert (saga.row.token, saga.entries) == (owner.token, ())
                assert await journal.entries(late) == {}
            else:
                assert saga.row.token == late.token
                assert await journal.entries(late) == {"step": done()}

"""The contract of Look, Due, Browse and Purge, and of sagas of a newer format."""

from __future__ import annotations

from typing import Any

import pytest

from idempotency._sagas.journal import Amend, Browse, Due, Look, Open, Phase, Purge, Put, Request, Wake
from idempotency.errors import UnreadableError
from idempotency.testing.journal._journal import (
    SHORT,
    TWINS,
    Contract,
    Journal,
    MakeNewer,
    done,
    ending,
    leave,
    new_name,
    opening,
    rival,
    write,
)


async def in_every_state(journal: Journal, name: str) -> dict[str, Open]:
    """Record a saga of each kind, in this order; each is younger than the one before."""
    requests = {
        key: opening(name, key, lease=0.0 if key == "recorded" else 30.0)
        for key in ("running", "recorded", "waiting", "stuck", "done", "undone", "free", "lapsed")
    }
    for key, request in requests.items():
        await journal(request)
        match key:
            case "waiting":
                await journal(leave(request, due=20.0))
            case "stuck":
                await journal(leave(request, due=None, phase=Phase.UNDOING))
            case "done":
                await journal(ending(request))
            case "undone":
                await journal(ending(request, phase=Phase.UNDONE))
            case "free":
                await journal(leave(request, due=0.0))
            case "lapsed":
                await journal(write(request, lease=0.0))
        await journal.pause(0.02)
    return requests


class ReadContract(Contract):
    """Check what is found of sagas."""

    async def test_look(self, journal: Journal, other_journal: Journal) -> None:
        """A saga is found with its row and entries, also by others than its owner; looking changes nothing."""
        request = opening()
        await journal.owned(request)
        await journal(write(request, done()))

        first, second = await other_journal(Look(id=request.id)), await journal(Look(id=request.id))

        assert first is not None
        assert second is not None
        assert (first.row.token, first.row.input, first.row.attempt) == (request.token, b"input", 1)
        assert [(entry.name, entry.body) for entry in first.entries] == [("step", b"done")]
        assert (second.row.attempt, second.row.wakes, second.row.crashes) == (1, 0, 0)
        assert await journal(write(request)) == 0

    async def test_look_at_what_is_not_there(self, journal: Journal) -> None:
        """There is nothing of a saga that was never recorded, or has expired."""
        request = opening()
        await journal.owned(request)
        await journal(ending(request, ttl=SHORT))
        await journal.expired(request)

        assert await journal(Look(id=request.id)) is None
        assert await journal(Look(id=opening().id)) is None

    async def test_due(self, journal: Journal) -> None:
        """What nobody owns, or has lapsed, is due, in the order since when; what runs, waits or has ended is not."""
        name = new_name()
        requests = await in_every_state(journal, name)

        rows = await journal(Due(names=[name]))

        assert [row.key for row in rows] == ["recorded", "free", "lapsed"]
        assert [row.token for row in rows] == ["", "", requests["lapsed"].token]
        assert [row.due_in is not None and row.due_in <= 0 for row in rows] == [True] * 3
        assert {(row.name, row.input, row.phase) for row in rows} == {(name, b"input", Phase.FORWARD)}
        assert [row.key for row in await journal(Due(names=[name], limit=2))] == ["recorded", "free"]

    async def test_due_for_longest_first(self, journal: Journal) -> None:
        """The order is that of the times from when on they are due, and not that of their first records."""
        name = new_name()
        requests = {key: opening(name, key) for key in ("first", "second", "third")}
        for request in requests.values():
            await journal.owned(request)
        for key in ("third", "first", "second"):
            await journal(leave(requests[key], due=0.0))
            await journal.pause(0.02)

        assert [row.key for row in await journal(Due(names=[name]))] == ["third", "first", "second"]
        assert [row.key for row in await journal(Due(names=[name], limit=1))] == ["third"]

    async def test_a_wait_that_is_over_is_due(self, journal: Journal) -> None:
        """A saga is due once its wait is over, before those that are due for less long."""
        name = new_name()
        waiting, recorded = opening(name, "waiting"), opening(name, "recorded", lease=0.0)
        await journal.owned(waiting)
        await journal(leave(waiting, due=SHORT))
        before = await journal(Due(names=[name]))
        await journal.over(waiting)
        await journal.pause(0.02)
        await journal(recorded)

        assert before == []
        assert [row.key for row in await journal(Due(names=[name]))] == ["waiting", "recorded"]

    async def test_what_was_due_is_not_any_more(self, journal: Journal) -> None:
        """A saga that is owned, waits again or has ended is not due."""
        name = new_name()
        requests = [opening(name, key, lease=0.0) for key in ("owned", "waiting", "ended", "due")]
        for request in requests:
            await journal(request)
        owners = [rival(request) for request in requests[:3]]
        for owner in owners:
            await journal.owned(owner)
        await journal(leave(owners[1], due=20.0))
        await journal(ending(owners[2]))

        assert [row.key for row in await journal(Due(names=[name]))] == ["due"]

    async def test_due_of_several_names(self, journal: Journal) -> None:
        """Of several names the sagas are in one order; those of other names are not there, however alike they are."""
        base = new_name()
        names = [f"{base} {twin}" for twin in TWINS]
        for name in (names[2], names[0], names[1], names[3]):
            await journal(opening(name, lease=0.0))
            await journal.pause(0.02)

        found = [row.name for row in await journal(Due(names=[names[0], names[2], names[3], new_name()]))]

        assert found == [names[2], names[0], names[3]]
        assert [row.name for row in await journal(Due(names=names[:3], limit=2))] == [names[2], names[0]]
        assert [row.name for row in await journal(Due(names=[names[1]]))] == [names[1]]

    async def test_due_of_every_name(self, journal: Journal) -> None:
        """Without names the sagas of every name are found."""
        requests = [opening(lease=0.0), opening(lease=0.0)]
        for request in requests:
            await journal(request)

        found = {row.id for row in await journal(Due(limit=100_000))}

        assert {request.id for request in requests} <= found

    async def test_browse(self, journal: Journal) -> None:
        """An operator sees the sagas of a name, the oldest first, and with ``stuck`` or ``ended`` what it says."""
        name = new_name()
        await in_every_state(journal, name)

        async def seen(**filters: Any) -> list[str]:
            return [row.key for row in await journal(Browse(name=name, **filters))]

        assert await seen() == ["running", "recorded", "waiting", "stuck", "free", "lapsed"]
        assert await seen(limit=2) == ["running", "recorded"]
        assert await seen(stuck=True) == ["stuck"]
        assert await seen(stuck=True, ended=True) == ["stuck"]
        every = ["running", "recorded", "waiting", "stuck", "done", "undone", "free", "lapsed"]
        assert await seen(ended=True) == every
        assert await seen(ended=True, limit=5) == every[:5]

    async def test_browse_every_name(self, journal: Journal) -> None:
        """Without a name the sagas of every name are found."""
        requests = [opening(), opening(lease=0.0)]
        for request in requests:
            await journal(request)
        await journal(leave(requests[0], due=None))

        every = {row.id for row in await journal(Browse(limit=100_000))}
        stuck = {row.id for row in await journal(Browse(stuck=True, limit=100_000))}

        assert {request.id for request in requests} <= every
        assert requests[0].id in stuck
        assert requests[1].id not in stuck

    async def test_what_was_stuck_is_not_any_more(self, journal: Journal) -> None:
        """A stuck saga is not stuck once it is due again, owned, or has ended."""
        name = new_name()
        requests = [opening(name, key) for key in ("woken", "signalled", "amended", "owned", "ended", "stuck")]
        for request in requests:
            await journal.owned(request)
            await journal(leave(request, due=None))
        await journal(Put(id=requests[1].id, entry=done("signal")))
        await journal(Amend(id=requests[2].id))
        for request in (requests[0], *requests[3:5]):
            await journal(Wake(id=request.id))
        for request in requests[3:5]:
            await journal.owned(rival(request, token=request.token))
        await journal(ending(requests[4], wakes=1))

        assert [row.key for row in await journal(Browse(name=name, stuck=True))] == ["stuck"]

    async def test_expired_are_not_found(self, journal: Journal) -> None:
        """A saga that has expired is neither due nor seen, and one that is recorded anew under its key is."""
        name = new_name()
        gone, anew = opening(name, "gone"), opening(name, "anew")
        for request in (gone, anew):
            await journal.owned(request)
            await journal(ending(request, ttl=SHORT))
            await journal.expired(request)

        assert await journal(Browse(name=name, ended=True)) == []
        await journal(rival(anew, lease=0.0))
        assert [row.key for row in await journal(Browse(name=name, ended=True))] == ["anew"]
        assert [row.key for row in await journal(Due(names=[name]))] == ["anew"]

    async def test_purge_deletes_only_expired(self, journal: Journal) -> None:
        """Purging deletes expired sagas with their entries, at most a batch at a time, and no others."""
        name = new_name()
        requests = await in_every_state(journal, name)
        gone = [opening(name, f"gone {number}") for number in range(3)]
        for request in gone:
            await journal.owned(request)
            await journal(ending(request, done(), ttl=SHORT))
        await journal.expired(gone[2])

        assert 0 <= await journal(Purge(batch=2)) <= 2
        while await journal(Purge(batch=100)):
            pass

        assert [await journal(Look(id=request.id)) for request in gone] == [None] * 3
        assert [row.key for row in await journal(Browse(name=name, ended=True))] == list(requests)
        await journal.owned(gone[0])
        assert await journal.entries(gone[0]) == {}

    async def test_newer_is_not_opened_or_written(self, journal: Journal, make_newer: MakeNewer) -> None:
        """A saga of a newer format is an error for every request that is for it, and stays as it is."""
        running, due, ended = opening(), opening(lease=0.0), opening()
        await journal.owned(running)
        await journal(due)
        await journal.owned(ended)
        await journal(ending(ended))
        for request in (running, due, ended):
            await make_newer(request.id)
            requests: list[Request[Any]] = [
                rival(request),
                rival(request, input=None),
                write(request, done()),
                leave(request, done()),
                ending(request),
                Put(id=request.id, entry=done()),
                Wake(id=request.id),
                Amend(id=request.id, entries=[done()]),
                Look(id=request.id),
            ]
            for refused in requests:
                with pytest.raises(UnreadableError, match="format 2"):
                    await journal(refused)

    async def test_newer_is_passed_over(self, journal: Journal, make_newer: MakeNewer) -> None:
        """Sagas of a newer format do not hide others that are due, and an operator sees that they are there."""
        name = new_name()
        requests = [opening(name, key, lease=0.0) for key in ("one", "two", "three")]
        for request in requests:
            await journal(request)
            await journal.pause(0.02)
        await make_newer(requests[0].id)
        await make_newer(requests[1].id)

        assert [row.key for row in await journal(Due(names=[name], limit=1))] == ["three"]
        rows = await journal(Browse(name=name))
        assert [row.version for row in rows] == [2, 2, 1]
        assert [row.input for row in rows] == [b"", b"", b"input"]

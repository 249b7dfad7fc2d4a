"""The contract of Amend."""

from __future__ import annotations

from idempotency._sagas.journal import Amend, Look, Phase
from idempotency.testing.journal._journal import (
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


class AmendContract(Contract):
    """Check what an operator changes by hand."""

    async def test_changes_a_stuck_saga(self, journal: Journal) -> None:
        """Entries are deleted, then written; phase and result are changed; and the saga is due at once."""
        request = opening()
        await journal.owned(request)
        await journal(write(request, begun("one"), begun("two"), begun("three")))
        await journal(leave(request, due=None, reason=b"stuck"))

        assert await journal(
            Amend(
                id=request.id,
                entries=[done("two"), done("four")],
                without=["one", "two", "never written"],
                phase=Phase.UNDOING,
                result=b"failure",
            )
        )

        assert await journal.entries(request) == {"two": done("two"), "three": begun("three"), "four": done("four")}
        row = await journal.owned(rival(request))
        assert (row.phase, row.result, row.reason) == (Phase.UNDOING, b"failure", b"stuck")
        assert (row.attempt, row.crashes, row.wakes) == (2, 0, 1)

    async def test_what_is_not_given_stays(self, journal: Journal) -> None:
        """Without changes a saga that waits is only due at once; phase, result and entries stay."""
        request = opening()
        await journal.owned(request)
        await journal(write(request, done(), phase=Phase.UNDOING, result=b"failure"))
        await journal(leave(request, phase=Phase.UNDOING, due=20.0))

        assert await journal(Amend(id=request.id))

        row = await journal.owned(rival(request))
        assert (row.phase, row.result) == (Phase.UNDOING, b"failure")
        assert await journal.entries(request) == {"step": done()}

    async def test_an_entry_that_is_deleted_begins_anew(self, journal: Journal) -> None:
        """An entry that is deleted and written began now; one that is only written began before."""
        request = opening()
        await journal.owned(request)
        await journal(write(request, begun("one"), begun("two")))
        await journal(leave(request))
        await journal.pause(SHORT)
        await journal(Amend(id=request.id, entries=[done("one"), done("two")], without=["one"]))

        saga = await journal(Look(id=request.id))

        assert saga is not None
        began = {entry.name: entry.began for entry in saga.entries}
        assert began["one"] < SHORT <= began["two"]

    async def test_an_owner_that_runs_prevents_it(self, journal: Journal) -> None:
        """While an owner runs nothing is changed."""
        request = opening()
        await journal.owned(request)
        await journal(write(request, begun()))

        assert not await journal(Amend(id=request.id, entries=[done()], without=["step"], result=b"by hand"))

        row = await journal.row(request)
        assert (row.token, row.result, row.wakes) == (request.token, None, 0)
        assert await journal.entries(request) == {"step": begun()}
        assert await journal(write(request)) == 0

    async def test_an_owner_whose_lease_is_over_loses_it(self, journal: Journal) -> None:
        """An owner that seems to have vanished does not prevent it, and writes nothing any more."""
        request = await journal.lapsed()
        second = rival(request, lease=SHORT)
        await journal.owned(second)
        await journal.over(second)

        assert await journal(Amend(id=request.id, entries=[done()]))

        assert await journal(write(second, begun())) is None
        row = await journal.row(request)
        assert (row.token, row.crashes, row.wakes) == ("", 0, 1)
        assert (await journal.owned(rival(request))).crashes == 0
        assert await journal.entries(request) == {"step": done()}

    async def test_amend_repeated(self, journal: Journal) -> None:
        """An amendment whose answer was lost may be sent again."""
        request = opening(lease=0.0)
        await journal(request)
        amendment = Amend(id=request.id, entries=[done()], without=["step"], phase=Phase.UNDOING, result=b"failure")

        assert await journal(amendment)
        assert await journal(amendment)
        assert await journal.entries(request) == {"step": done()}
        assert (await journal.owned(rival(request))).phase is Phase.UNDOING

    async def test_a_saga_that_waits_is_changed_as_it_was_seen(self, journal: Journal) -> None:
        """With the attempt that was seen it is changed, also if repeated; once it was run again, it is not."""
        request = opening()
        await journal.owned(request)
        await journal(leave(request))
        amendment = Amend(id=request.id, attempt=1, entries=[done("one")])

        assert await journal(amendment)
        assert await journal(amendment)
        second = rival(request)
        await journal.owned(second)
        await journal(leave(second))

        assert not await journal(amendment)
        assert not await journal(Amend(id=request.id, attempt=1, token=request.token, entries=[done("one")]))
        assert await journal(Amend(id=request.id, attempt=2, entries=[done("two")]))
        assert await journal.entries(request) == {"one": done("one"), "two": done("two")}

    async def test_an_owner_that_returned_meanwhile_prevents_it(self, journal: Journal) -> None:
        """An owner that seemed to have vanished, and has ended its run since, has not done so unseen."""
        vanished, returned = await journal.lapsed(), await journal.lapsed()
        await journal(write(returned, begun()))
        await journal(leave(returned))

        for request, changed in ((vanished, True), (returned, False)):
            amendment = Amend(id=request.id, attempt=1, token=request.token, result=b"by hand")
            assert [await journal(amendment), await journal(amendment)] == [changed, changed]

        assert (await journal.row(returned)).result is None

    async def test_absent_or_ended_is_not_changed(self, journal: Journal) -> None:
        """A saga that is not there, or has ended, is not changed."""
        absent, ended = opening(), opening()
        await journal.owned(ended)
        await journal(ending(ended))

        for request in (absent, ended):
            assert await journal(Amend(id=request.id, entries=[done()], result=b"by hand")) is False

        assert await journal(Look(id=absent.id)) is None
        row = await journal.row(ended)
        assert (row.result, row.wakes, row.due_in) == (b"result", 0, None)
        assert await journal.entries(ended) == {}

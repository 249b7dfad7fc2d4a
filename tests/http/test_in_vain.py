"""What says that a retry is in vain, on replays of a status that clients retry."""

from __future__ import annotations

import pytest

from idempotency import Policy
from tests.kit.asgi_calls import Effects, Reply, call, protect, respond

pytestmark = pytest.mark.fronts("asgi", "wsgi")


def advice(reply: Reply) -> list[tuple[bytes, bytes]]:
    """Return the header fields that clients of Stripe and OpenAI obey."""
    return [pair for pair in reply.headers if pair[0].lower() in (b"stripe-should-retry", b"x-should-retry")]


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503, 599])
async def test_a_replay_that_clients_would_retry_says_that_this_is_in_vain(status: int) -> None:
    """The record gives the same answer for a day; the first answer is the application's alone."""
    protected = protect(Effects(status=status), policy=Policy(outcomes={status: "store"}))

    first, replay = [await call(protected, key="k") for _ in range(2)]

    assert (first.status, advice(first)) == (status, [])
    assert replay.replayed
    assert advice(replay) == [(b"stripe-should-retry", b"false"), (b"x-should-retry", b"false")]


@pytest.mark.parametrize("status", [200, 201, 204, 303, 404, 422])
async def test_other_replays_are_as_they_were(status: int) -> None:
    """No client retries them."""
    protected = protect(Effects(status=status))

    first, replay = [await call(protected, key="k") for _ in range(2)]

    assert replay.replayed
    assert replay.headers == [*first.headers, (b"idempotent-replayed", b"true")]


async def test_what_the_application_advised_for_its_first_answer_does_not_hold_for_the_replay() -> None:
    """There is one advice in a replay, whatever the application said."""

    async def handler(_: object, __: object, send: object) -> None:
        await respond(send, 503, headers=[(b"X-Should-Retry", b"true")])

    protected = protect(Effects(handler), policy=Policy(outcomes={503: "store"}))

    first, replay = [await call(protected, key="k") for _ in range(2)]

    assert advice(first) == [(b"X-Should-Retry", b"true")]
    assert advice(replay) == [(b"stripe-should-retry", b"false"), (b"x-should-retry", b"false")]


async def test_the_replay_of_an_exception_is_in_vain() -> None:
    """A recorded exception is a 500 that comes again."""

    async def handler(*_: object) -> None:
        raise ValueError("a failure")

    protected = protect(Effects(handler), policy=Policy(outcomes={ValueError: "store"}))

    with pytest.raises(ValueError, match="a failure"):
        await call(protected, key="k")
    replay = await call(protected, key="k")

    assert (replay.status, len(advice(replay))) == (500, 2)

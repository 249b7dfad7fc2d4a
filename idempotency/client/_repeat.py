"""Send a request with a key until its answer is one to return. Needs anyio, which httpx brings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import anyio

from idempotency.client._answers import Attempts
from idempotency.client._call import Call


class _Answer(Protocol):
    async def aclose(self) -> None: ...


A = TypeVar("A", bound=_Answer)


async def repeat(
    call: Call,
    attempts: Attempts,
    send: Callable[[], Awaitable[A]],
    failures: tuple[type[Exception], ...],
    is_lasting: Callable[[Exception], bool],
    pause_of: Callable[[A], float | None],
) -> A:
    """Send a request, and send it again where that is of use; return its last answer, or raise its last error.

    ``failures``: the errors after which it may be sent again; ``is_lasting``: whether one will come each time.
    ``pause_of``: the seconds that an answer asks to wait; None if another attempt is of no use.
    """
    while True:
        call.attempts += 1
        try:
            answer = await send()
        except failures as error:
            pause = attempts.pause(None if is_lasting(error) else 0.0)
            if pause is None:
                raise
        else:
            pause = attempts.pause(pause_of(answer))
            if pause is None:
                return answer
            await answer.aclose()
        await anyio.sleep(pause)

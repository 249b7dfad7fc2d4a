"""Send a request with a key until its answer is one to return, for clients that are not awaited."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from idempotency.client._answers import Attempts
from idempotency.client._call import Call


class _Answer(Protocol):
    def close(self) -> None: ...


A = TypeVar("A", bound=_Answer)


def repeat_sync(
    call: Call,
    attempts: Attempts,
    send: Callable[[], A],
    failures: tuple[type[Exception], ...],
    is_lasting: Callable[[Exception], bool],
    pause_of: Callable[[A], float | None],
) -> A:
    """See :func:`idempotency.client._repeat.repeat`."""
    while True:
        call.attempts += 1
        try:
            answer = send()
        except failures as error:
            pause = attempts.pause(None if is_lasting(error) else 0.0)
            if pause is None:
                raise
        else:
            pause = attempts.pause(pause_of(answer))
            if pause is None:
                return answer
            answer.close()
        time.sleep(pause)

"""What the rules of a saga ask for: they are generators, which yield effects and are sent what came of them.

So there is one text of the rules, and two small drivers: one awaits each effect, the other one blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from idempotency._rules import Claim
from idempotency._sagas.journal import Request, Write
from idempotency.operation import Operation

if TYPE_CHECKING:
    from idempotency.saga._run import Run

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ask:
    """Send a request to the journal; the answer is sent back."""

    request: Request[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Call a function of the user, awaited if it returns an awaitable, while ``operation`` is the running one.

    ``timeout``: seconds after which it is cancelled, with TimeoutError.
    """

    function: Callable[[], Any]
    operation: Operation
    timeout: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """Call a function of the user with a session, and commit its effect with what ``write`` makes of its value.

    ``operation`` makes the running operation, given its transaction. ``called`` is given ``Row.wakes`` as the write
    answers it. ``lost`` makes the error of an owner that is not it any more.
    """

    function: Callable[[Any], Any]
    claim: Claim
    operation: Callable[[Any], Operation]
    write: Callable[[Any], Write]
    called: Callable[[int], object]
    lost: Callable[[], Exception]
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Play:
    """Call the function of the saga itself; its value and its error are sent back, one of them None."""

    run: Run
    arguments: dict[str, Any]


Effect = Ask | Call | Join | Pause | Play

Program = Generator[Effect, Any, T]
"""A program of effects, which returns a T."""

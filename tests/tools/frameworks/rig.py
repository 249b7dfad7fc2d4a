"""One conversation of an agent, whose model is scripted, in the tool loop of a framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CONVERSATION = "conversation-1"


@dataclass(frozen=True)
class Call:
    """The model's call of the tool."""

    id: str
    arguments: dict[str, Any]


def refund_call(call: str, order: str = "order-7", amount: int = 5, **more: Any) -> Call:
    """Make a call of the tool that refunds an order."""
    return Call(call, {"order_id": order, "amount": amount, **more})


@dataclass(frozen=True)
class Answer:
    """What the model was answered for one of its calls. ``failed``: whether the framework marks it as an error."""

    call: str
    text: str
    failed: bool = field(default=False, compare=False)


class Rig(ABC):
    """An agent with one tool, in one framework."""

    def __init__(
        self, function: Callable[..., Any], *, timeout: float | None = None, caller: str = "", directory: str = ""
    ) -> None:
        """Make the agent.

        ``function``: what the tool calls. ``timeout``: the framework's own, in seconds. ``caller``: who is
        authenticated. ``directory``: where the framework keeps what a saved conversation needs.
        """
        self.function = function
        self.timeout = timeout
        self.caller = caller
        self.directory = directory

    @abstractmethod
    async def talk(self, *turns: list[Call], conversation: str = CONVERSATION) -> list[Answer]:
        """Let the model make the calls of each turn, and then end; return the answers to them in their order."""

    @abstractmethod
    async def save(self, *calls: Call, conversation: str = CONVERSATION) -> str:
        """Let the model make calls, and save the conversation before any is executed; return what resumes it."""

    @abstractmethod
    async def resume(self, saved: str) -> list[Answer]:
        """Go on with a saved conversation, maybe in another process; the calls are executed, and the model ends."""

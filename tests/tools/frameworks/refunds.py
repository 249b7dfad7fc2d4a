"""The tool of the tests: it refunds an order, and each refund is a line in a file."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from idempotency.tool import NOT_DONE, NotDone, idempotent_tool


class Refunds:
    """The provider that refunds: its ledger is a file, which outlives a process that is killed."""

    def __init__(self, directory: str | Path) -> None:
        self._file = Path(directory) / "refunds"

    @property
    def made(self) -> list[str]:
        """The refunds, such as ``"order-7 5"``."""
        return self._file.read_text().splitlines() if self._file.exists() else []

    def make(self, order_id: str, amount: int) -> str:
        """Refund an order, and return what the provider answers."""
        with self._file.open("a") as file:
            file.write(f"{order_id} {amount}\n")
        return f"refund {len(self.made)} of {amount}"

    async def find(self, order_id: str, amount: int) -> str | NotDone:
        """Find the refund of an order, as ``verify=`` does."""
        return f"found a refund of {amount}" if f"{order_id} {amount}" in self.made else NOT_DONE

    def tool(self, store: Any, after: Callable[[], Awaitable[object]] | None = None, **options: Any) -> Any:
        """Make the idempotent tool. ``after`` is awaited between the refund and the end of the tool."""

        @idempotent_tool(store, **{"name": "refund", **options})
        async def refund(order_id: str, amount: int) -> str:
            """Refund an order."""
            made = self.make(order_id, amount)
            if after is not None:
                await after()
            return made

        return refund

"""How the consumer processes of the FastStream adapter run."""

from __future__ import annotations

import signal
from typing import Any

from faststream import FastStream

from idempotency.adapters.faststream import check


async def serve(broker: Any) -> None:
    """Run an app with ``broker`` until SIGTERM."""
    check(broker)
    app = FastStream(broker, logger=None)

    @app.after_startup
    async def started() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    # FastStream starts subscribers even after it was told to stop, and then does not end.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    await app.run()

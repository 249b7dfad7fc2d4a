"""The command line: what an operator does with records. Its commands are in ``idempotency._cli.commands``."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line on ``sys.argv`` and return its exit code: 0, 1 (doctor: something must be fixed) or 2."""
    try:
        import rich  # noqa: F401
        import typer
    except ImportError:
        return _failed("the command line needs packages that are not installed: pip install 'asgi-idempotency[cli]'")
    from idempotency._cli.commands import app

    try:
        return app(prog_name="idempotency", standalone_mode=False) or 0
    except typer.Abort:
        return _failed("aborted")
    except Exception as error:
        # The class of a usage error is click's, or that of the click inside typer, by typer's version.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        return _failed(message())


def _failed(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2

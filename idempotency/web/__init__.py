"""A page that shows what is stuck, and why."""

from __future__ import annotations

from idempotency.errors import ConfigurationError

try:
    import jinja2  # noqa: F401
    import starlette  # noqa: F401
except ImportError as error:
    raise ConfigurationError("the page needs Starlette and Jinja2: pip install 'asgi-idempotency[web]'") from error

from idempotency.web._console import Console, console
from idempotency.web._operator import Operator

__all__ = ["Console", "Operator", "console"]

"""What a middleware protects, for those who describe it."""

from __future__ import annotations

from dataclasses import dataclass

from idempotency._http.options import Options
from idempotency._http.routes import Routes


@dataclass(frozen=True, slots=True)
class Protection:
    """The routes of one middleware with their policies, and what all its requests have in common."""

    routes: Routes
    options: Options

"""What describes documents as a user's type checker sees it: checked by mypy and pyright, never run."""

from __future__ import annotations

from typing import Any, assert_type

from fastapi import FastAPI

from idempotency import IdempotencyMiddleware
from idempotency.openapi import describe, document


def describe_documents(app: FastAPI, middleware: IdempotencyMiddleware, given: dict[str, Any]) -> None:
    assert_type(describe(given, middleware), dict[str, Any])
    describe(given, middleware, prefix="/v1", vendors=["fern", "speakeasy"])
    document(app)
    document(app, outer=app, vendors={"fern"})
    describe(given, app)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    document(app, vendors=["stainless"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]

"""The middleware for WSGI as a user's type checker sees it: checked by mypy and pyright, never run."""

from __future__ import annotations

from collections.abc import Iterable
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from flask import Flask
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from idempotency import Policy, Profile, open_store
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from idempotency.wsgi import IdempotencyMiddleware


def plain(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [])
    return [b""]


def user_of(environ: WSGIEnvironment) -> str | None:
    return environ.get("REMOTE_USER")


def body_of(environ: WSGIEnvironment) -> bytes:
    data: bytes = environ["wsgi.input"].read()
    return data


engine = create_engine("postgresql+psycopg://app@localhost/shop")
application: WSGIApplication = IdempotencyMiddleware(plain, store="redis://localhost:6379")
IdempotencyMiddleware(application, store=open_store("memory://"), scope=user_of, policy=Policy(fingerprint=body_of))
IdempotencyMiddleware(plain, store=MemoryStore(), scope=None, profile=Profile.stripe, policies={"/orders": None})
IdempotencyMiddleware(plain, store=SQLStore(engine), session=sessionmaker(engine), secret="s3cret")

app = Flask(__name__)
app.wsgi_app = IdempotencyMiddleware(app.wsgi_app, store="redis://localhost:6379")  # type: ignore[method-assign]

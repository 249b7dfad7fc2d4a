"""The options of the middleware, checked when it is made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from idempotency._hooks import check_callable
from idempotency._http.caller import Credentials, CredentialScope, KnownCaller, UnknownCredentials
from idempotency._http.error_hook import FIELD_NAME, ErrorHook
from idempotency._http.problem import check_docs
from idempotency._http.profile import Profile
from idempotency._http.routes import Routes
from idempotency.errors import ConfigurationError
from idempotency.policy import Policy

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment

    from starlette.requests import Request

Caller = str | bytes | int | None
CallerScope = Callable[["Request"], Caller | Awaitable[Caller]]
EnvironScope = Callable[["WSGIEnvironment"], Caller]


@dataclass(frozen=True, slots=True)
class Options:
    """What all requests of one middleware have in common, in the form in which a request needs it."""

    caller: Callable[[Any], Any] | Credentials | KnownCaller | None
    secret: bytes | None
    header_name: bytes
    """The name of the header with the key, in lower case."""
    replayed: tuple[bytes, bytes]
    """The header that marks a replay."""
    strict: bool
    docs: str
    error: ErrorHook | None
    echo_key: bool
    transactional: bool
    """Whether the effect of a request is committed together with its response."""


@dataclass(frozen=True, slots=True)
class Protection:
    """The routes of one middleware with their policies, and what all its requests have in common."""

    routes: Routes
    options: Options


def protect(
    scope: CallerScope | EnvironScope | CredentialScope | KnownCaller | None,
    unknown_credentials: UnknownCredentials,
    secret: bytes | str | None,
    header_name: str,
    replayed_header: str,
    strict: bool,
    docs: str,
    profile: Profile,
    policies: Mapping[str, Policy | None] | None,
    session: object,
) -> Protection:
    """Check the options of a middleware, whose docstring says what they mean, and put them into their two objects.

    Raises :class:`~idempotency.errors.ConfigurationError` for a value that cannot work.
    """
    named = scope is None or isinstance(scope, KnownCaller) or scope in ("credentials", "authorization")
    if not (named or callable(scope)):
        raise ConfigurationError(f'scope must be "credentials", "authorization", a callable or None, not {scope!r}')
    if unknown_credentials not in ("warn", "refuse"):
        raise ConfigurationError(f'unknown_credentials must be "warn" or "refuse", not {unknown_credentials!r}')
    for option, name in (("header_name", header_name), ("replayed_header", replayed_header)):
        if not isinstance(name, str) or not FIELD_NAME.fullmatch(name):
            raise ConfigurationError(f"{option} must be the name of a header, not {name!r}")
    if secret is not None and (not isinstance(secret, str | bytes) or not secret):
        raise ConfigurationError("secret must be bytes or text, and not empty; None: the digests are not keyed")
    secret = secret.encode() if isinstance(secret, str) else secret
    header = header_name.lower().encode("ascii")
    if not isinstance(profile.echo_key, bool):
        raise ConfigurationError(f"echo_key must be True or False, not {profile.echo_key!r}")
    if profile.error is not None:
        check_callable("error", profile.error)
    options = Options(
        caller=_caller(scope, secret, header, unknown_credentials),
        secret=secret,
        header_name=header,
        replayed=(replayed_header.lower().encode("ascii"), b"true"),
        strict=strict,
        docs=check_docs(docs),
        error=profile.error,
        echo_key=profile.echo_key,
        transactional=session is not None,
    )
    return Protection(Routes(profile.policy, {} if policies is None else policies), options)


def _caller(
    scope: CallerScope | EnvironScope | CredentialScope | KnownCaller | None,
    secret: bytes | None,
    key_header: bytes,
    unknown: UnknownCredentials,
) -> Callable[[Any], Any] | Credentials | KnownCaller | None:
    if scope is None or isinstance(scope, KnownCaller) or callable(scope):
        return scope
    return Credentials(scope, secret, key_header, unknown)


def require_starlette() -> None:
    """Check that Starlette is installed, whose ``Request`` the callables of the user are given."""
    try:
        import starlette.requests  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            "a callable scope or fingerprint is given a Starlette Request: pip install starlette"
        ) from error

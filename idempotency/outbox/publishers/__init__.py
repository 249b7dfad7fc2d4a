"""Publishers of the outbox: one module for each broker, made directly or by URL."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit

from idempotency._hooks import import_named, is_coroutine_function
from idempotency._outbox.limits import Limits
from idempotency._sql.requirements import not_installed
from idempotency.errors import ConfigurationError, UnknownOptionError
from idempotency.outbox.publisher import Publisher
from idempotency.outbox.publishers._brokers import FUNCTION, Broker, broker_of

__all__ = ["limits_of", "open_publisher"]


class _Module(Protocol):
    """What the module of a broker has.

    ``OPTIONS``: the options that are given in the query of a URL, and how each is read from text. ``CLIENT_OPTIONS``:
    the parts of the query that are for the client, and stay in the URL.
    """

    OPTIONS: Mapping[str, Callable[[str], Any]]
    CLIENT_OPTIONS: frozenset[str]

    def from_url(self, url: str, options: Mapping[str, Any], /) -> Publisher: ...


def open_publisher(url: str) -> Publisher:
    """Make the publisher that a URL names; it connects at its first use, and ``aclose`` closes it.

    ``url``: amqp://, nats://, redis://, kafka://, sqs://, celery+amqp:// or another scheme for Celery, https:// for a
    webhook, or ``module:name`` for a coroutine function or a publisher of your own. The options of the publisher are
    its query, such as ``?topic=orders``.

    Raises :class:`~idempotency.errors.ConfigurationError` for a URL that cannot be read, an option that is not known,
    and a package that is not installed, naming what to install.
    """
    broker = broker_of(url)
    if broker is None:
        return _imported(url)
    scheme = url.partition("://")[0]
    module = _module(broker, scheme)
    # urlunsplit() drops the slashes where there is no host.
    place, _, text = url.partition("?")
    try:
        urlsplit(place)
        query = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text))
    except ValueError:
        # The error may quote the part of the URL that has the password in it.
        raise ConfigurationError(f"this {scheme}:// URL cannot be read") from None
    unknown = [name for name, _ in query if name not in {*module.OPTIONS, *module.CLIENT_OPTIONS}]
    if unknown:
        known = ", ".join([*module.OPTIONS, *sorted(module.CLIENT_OPTIONS)])
        raise UnknownOptionError(f"{unknown[0]!r} is no option of a {scheme}:// URL; they are {known}")
    options = {name: _read(name, text, module.OPTIONS[name]) for name, text in query if name in module.OPTIONS}
    for_client = urlencode([(name, text) for name, text in query if name in module.CLIENT_OPTIONS])
    return module.from_url(f"{place}?{for_client}" if for_client else place, options)


def limits_of(url: str) -> Limits:
    """Return what the messages of a publisher's URL may be, without the package of its client."""
    broker = broker_of(url)
    return FUNCTION if broker is None else broker.limits


def _module(broker: Broker, scheme: str) -> _Module:
    try:
        importlib.import_module(broker.client)
    except ImportError as error:
        raise not_installed(scheme, broker.client, f"asgi-idempotency[{broker.extra}]") from error
    found: Any = importlib.import_module(f"{__name__}.{broker.module}")
    module: _Module = found
    return module


def _read(name: str, text: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(text)
    except ValueError as error:
        raise ConfigurationError(f"{name} in the URL cannot be {text!r}") from error


def _imported(path: str) -> Publisher:
    """Return the publisher at ``module:name``, or a publisher of the function there."""
    from idempotency.outbox.publishers.function import FunctionPublisher

    found = import_named("a publisher is a URL or", path)
    if is_coroutine_function(found):
        return FunctionPublisher(found)
    if not is_coroutine_function(getattr(found, "publish", None)):
        raise ConfigurationError(f"{path!r} is neither a coroutine function nor a publisher")
    publisher: Publisher = found
    return publisher

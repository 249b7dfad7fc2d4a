"""The results of FastStream's handlers as bytes.

A record begins with one byte: ``p``: a value, encoded by the handler's annotation. ``w``: a value as it is published,
where there is no annotation, or it does not describe the value. ``r``: a Response. ``a``: an AckMessage, with which
nothing is published.
"""

from __future__ import annotations

import base64
import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import Any

from faststream.message import encode_message
from faststream.response import Response

from idempotency._results.codec import Codec, Results, results_of
from idempotency.errors import ConfigurationError

_TEXT, _JSON = "text/plain", "application/json"


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded result. A result that was not recorded is a bare None instead."""

    value: Any


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The result of a handler that raised AckMessage: the message is done, and nothing is published."""

    options: dict[str, Any]


class ResultCodec:
    """The codec of the results of one handler, so that they can be published again.

    ``serializer``: the one with which the broker publishes them; None: plain JSON values only.
    """

    def __init__(self, function: Callable[..., Any], codec: Codec | None, broker: str, serializer: Any = None) -> None:
        self._results = _results(function, codec)
        self._broker = broker
        self._serializer = serializer

    def encode(self, value: Any) -> bytes:
        """Encode what the handler returned; raises for a result that could not be published again unchanged."""
        if isinstance(value, Acknowledged):
            return b"a"
        if isinstance(value, Response):
            return b"r" + self._encode_response(value)
        if self._results is not None:
            # It fails where the value does not match the annotation, as when a middleware has replaced it.
            with suppress(Exception):
                return b"p" + self._results.encode(value)
        return b"w" + _to_wire(value, self._serializer)

    def decode(self, data: bytes) -> Recorded:
        """Decode what :meth:`encode` wrote."""
        kind, rest = data[:1], data[1:]
        if kind == b"a":
            return Recorded(Acknowledged({}))
        if kind == b"r":
            return Recorded(self._decode_response(rest))
        if kind == b"w":
            return Recorded(_from_wire(rest))
        if self._results is None:
            raise ValueError("the handler's annotation has changed")
        return Recorded(self._results.decode(rest))

    def _encode_response(self, response: Response) -> bytes:
        kind = type(response)
        if self._response(kind.__name__) is not kind:
            raise TypeError(f"{kind.__qualname__} is a Response class of the application, not of FastStream")
        given = dict(vars(response))
        body = _to_wire(given.pop("body"), self._serializer)
        options = given | given.pop("message_options", {}) | given.pop("publish_options", {})
        usual = {name: each.default for name, each in inspect.signature(kind).parameters.items()}
        changed = {
            name: _plain(value)
            for name, value in options.items()
            if name not in ("message_options", "publish_options") and value is not usual.get(name)
        }
        head = json.dumps([kind.__name__, changed]).encode()
        return b"%d:%b%b" % (len(head), head, body)

    def _decode_response(self, data: bytes) -> Response:
        length, _, rest = data.partition(b":")
        name, options = json.loads(rest[: int(length)])
        given = {each: base64.b64decode(value) if kind == "b" else value for each, (kind, value) in options.items()}
        response: Response = self._response(name)(_from_wire(rest[int(length) :]), **given)
        return response

    def _response(self, name: str) -> Any:
        if name == Response.__name__:
            return Response
        found = getattr(import_module(f"faststream.{self._broker}"), name, None)
        return found if isinstance(found, type) and issubclass(found, Response) else None


def _results(function: Callable[..., Any], codec: Codec | None) -> Results | None:
    if codec is None and getattr(function, "__annotations__", {}).get("return") is None:
        return None
    try:
        return results_of(function, codec)
    except ConfigurationError:
        # Such as a Response, or a type that only FastStream's serializer can encode.
        return None


def _to_wire(value: Any, serializer: Any) -> bytes:
    if value is None:
        return b"n"
    body, content_type = encode_message(value, serializer)
    return {None: b"b", _TEXT: b"t", _JSON: b"j"}[content_type] + body


def _from_wire(data: bytes) -> Any:
    kind, body = data[:1], data[1:]
    match kind:
        case b"n":
            return None
        case b"b":
            return body
        case b"t":
            return body.decode()
        case b"j":
            found = json.loads(body)
            if not isinstance(found, str):
                return found
            # Such as a time or a UUID, which were published as JSON. A str would be published as text.
            published: Any = Enum("published", {"JSON": found})
            return published.JSON
    raise ValueError(f"unknown kind {kind!r}")


def _plain(value: Any) -> tuple[str, Any]:
    if isinstance(value, bytes):
        return "b", base64.b64encode(value).decode()
    if json.loads(json.dumps(value)) != value:
        raise TypeError(f"{type(value).__name__} is an option of a Response that cannot be recorded")
    return "j", value

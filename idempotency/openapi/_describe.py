"""Add what a middleware does for an API to the OpenAPI document of that API."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

from idempotency._http.caller import Credentials
from idempotency._http.key import MAX_LENGTH
from idempotency._http.options import Options, Protection
from idempotency.errors import ConfigurationError
from idempotency.openapi._answers import answers
from idempotency.openapi._components import Components, Json, list_of, object_of
from idempotency.openapi._responses import beside, is_replayed, merged, ours, with_headers
from idempotency.openapi._vendors import Vendor, check_vendors, extend
from idempotency.policy import Policy

EXTENSION = "x-idempotency"

_METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
_UUID = "8e03978e-40d5-43dd-bc93-6894a57f9324"

# What the middleware accepts besides, such as a key with a backslash or with parameters, no client needs.
_STRING = rf'"[ !#-\[\]-~]{{1,{MAX_LENGTH - 2}}}"'
_BARE = rf"[!#-+.-~-]{{1,{MAX_LENGTH}}}"


@runtime_checkable
class Protecting(Protocol):
    """A middleware whose protection can be described, as an :class:`~idempotency.IdempotencyMiddleware` is."""

    @property
    def protection(self) -> Protection:
        """Which requests are protected and how."""
        ...


def describe(
    document: Mapping[str, Any], middleware: Protecting, *, prefix: str = "", vendors: Collection[Vendor] = ()
) -> dict[str, Any]:
    """Return a copy of an OpenAPI document (3.0 or 3.1) that says which operations ``middleware`` protects, and how.

    Each protected operation gets the header with the key as a parameter, the responses that the middleware gives
    itself, the header that marks a replay, and the extension ``x-idempotency``. What the document says stays: a
    response of the same status is merged, a parameter for the header is not repeated, and an operation that has
    ``x-idempotency`` is not described again. A path of the document is matched to the policies as a template:
    ``{name}`` is matched by no literal. ``document`` is not changed.

    ``prefix``: what the middleware sees before the paths of the document, as ``"/v1"``. Default: nothing.
    ``vendors``: the generators of SDKs whose extensions are written, ``"fern"`` and ``"speakeasy"``. Default: none.

    A hook ``error=`` of the middleware is called once for each error, for the examples.

    Raises :class:`~idempotency.errors.ConfigurationError` for another version of OpenAPI, and for a reference that
    cannot be followed.
    """
    if not isinstance(middleware, Protecting):
        raise ConfigurationError(f"describe() takes an IdempotencyMiddleware, not {type(middleware).__name__}")
    if not isinstance(prefix, str) or (prefix and (not prefix.startswith("/") or prefix.endswith("/"))):
        raise ConfigurationError(f'prefix must be empty or a path such as "/v1", not {prefix!r}')
    chosen = check_vendors(vendors)
    _check_version(document)
    described: Json = deepcopy(dict(document))
    components, protection = Components(described), middleware.protection
    for path, item in _paths(described, components):
        for method in _METHODS:
            operation = object_of(item.get(method))
            policy = protection.routes.policy_for(method.upper(), prefix + path)
            if policy is not None and item.get(method) is not None and EXTENSION not in operation:
                # A copy: one operation may be that of several paths, which have policies of their own.
                operation = item[method] = {**operation}
                _Description(policy, protection.options, components).add_to(operation, list_of(item.get("parameters")))
                extend(described, operation, policy, field_name(protection.options.header_name), chosen)
    return described


def _check_version(document: object) -> None:
    if not isinstance(document, Mapping):
        raise ConfigurationError(f"an OpenAPI document is a mapping, not {type(document).__name__}")
    version = document.get("openapi", document.get("swagger"))
    if not isinstance(version, str) or not version.startswith(("3.0.", "3.1.")):
        raise ConfigurationError(f"describe() takes documents of OpenAPI 3.0 and 3.1, not {version!r}")


def _paths(document: Json, components: Components) -> list[tuple[str, Json]]:
    """Return the paths with their items, each a copy, in which references are replaced by what they refer to."""
    paths = object_of(document.get("paths"))
    found = {path: item for path, item in paths.items() if path.startswith("/") and item is not None}
    for path, item in found.items():
        paths[path] = components.resolve(item) if "$ref" in object_of(item) else {**item}
    return [(path, paths[path]) for path in found]


def field_name(name: bytes) -> str:
    """Write the name of a header as documents do: ``Idempotency-Key``."""
    return "-".join(word.capitalize() for word in name.decode("ascii").split("-"))


class _Description:
    """What a document says of one operation."""

    def __init__(self, policy: Policy, options: Options, components: Components) -> None:
        self._policy = policy
        self._options = options
        self._components = components
        self._header = field_name(options.header_name)

    def add_to(self, operation: Json, of_path: list[Any]) -> None:
        """Describe an operation. ``of_path``: the parameters that all operations of its path have."""
        operation[EXTENSION] = {
            "required": self._policy.required,
            "ttl": _number(self._policy.ttl),
            "scope": _scope(self._options),
        }
        own = list_of(operation.get("parameters"))
        if not self._is_declared([*of_path, *own]):
            operation["parameters"] = [
                *own,
                self._components.add("parameters", "IdempotencyKey", self._parameter()),
            ]
        # A key of YAML may be a number.
        responses = {str(status): response for status, response in object_of(operation.get("responses")).items()}
        theirs = self._of_application(responses)
        operation["responses"] = {**theirs, **self._ours(theirs)}

    def _is_declared(self, parameters: list[Any]) -> bool:
        found = (self._components.resolve(parameter) for parameter in parameters)
        return any(
            each.get("in") == "header" and str(each.get("name")).lower() == self._header.lower() for each in found
        )

    def _parameter(self) -> Json:
        policy, strict = self._policy, self._options.strict
        parts = [
            "Names one operation, so that it can be retried without repeating its effect. Make a new key for each "
            "operation, such as a UUID, and send the same request with the same key on each retry: the retry gets the "
            f"result of the first, for {_number(policy.ttl)} seconds after its completion. Then the key is new. "
            f"Another request with the same key is answered {policy.mismatch_status}."
        ]
        if not policy.required:
            parts.append("A request without a key is not protected: a retry of it is another operation.")
        return {
            "name": self._header,
            "in": "header",
            "required": policy.required,
            "description": " ".join(parts),
            "schema": {
                "type": "string",
                "minLength": 3 if strict else 1,
                "maxLength": MAX_LENGTH,
                "pattern": f"^{_STRING}$" if strict else f"^(?:{_BARE}|{_STRING})$",
            },
            "example": f'"{_UUID}"' if strict else _UUID,
        }

    def _of_application(self, responses: Json) -> Json:
        found: Json = {}
        replayed = {field_name(self._options.replayed[0]): self._add_header("IdempotentReplayed", _REPLAYED)}
        for status, response in responses.items():
            if status.startswith("x-"):
                found[status] = response
                continue
            headers = {**replayed, **self._echo()} if is_replayed(status, self._policy) else self._echo()
            found[status] = with_headers(self._components.resolve(response), headers) if headers else response
        return found

    def _ours(self, theirs: Json) -> Json:
        of_status = ours(answers(self._policy, self._options), self._options.error, self._echo(), self._components)
        found: Json = {}
        for status, response in of_status.items():
            besides = beside(theirs, status, self._components)
            if besides is None:
                found[status] = self._components.add("responses", f"Idempotency{status}", response)
            else:
                found[status] = merged(besides, response)
        return found

    def _echo(self) -> Json:
        return {self._header: self._add_header("IdempotencyKey", _ECHO)} if self._options.echo_key else {}

    def _add_header(self, name: str, header: Json) -> Json:
        return self._components.add("headers", name, header)


_REPLAYED: Json = {
    "description": "Present if the response is the recorded one of an earlier request with this key.",
    "schema": {"type": "string", "enum": ["true"]},
}
_ECHO: Json = {"description": "The key of the request, as it was sent.", "schema": {"type": "string"}}


def _number(seconds: float) -> float | int:
    return int(seconds) if seconds.is_integer() else seconds


def _scope(options: Options) -> str:
    """Say what separates the keys of one caller from those of another."""
    match options.caller:
        case Credentials(scope=scope):
            return scope
        case None:
            return "shared"
        case _:
            return "application"

"""A transport, or an adapter, that is mounted for one server: what another server gets of a call."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests

from idempotency.client import AsyncIdempotentTransport, IdempotentAdapter, IdempotentTransport, call_of
from tests.clients.senders import AT_ONCE, KINDS, Answer, Scripted, scripted

EACH = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Scripted, Scripted]]:
    """The server for which it is mounted, and another one."""
    with scripted() as mounted, scripted() as other:
        yield mounted, other


def post(kind: str, server: Scripted, **options: Any) -> str | None:
    """Send a POST that follows redirects, and return the key of the call."""
    match kind:
        case "httpx":
            transport = IdempotentTransport(retry=AT_ONCE)
            with httpx.Client(mounts={server.url: transport}, follow_redirects=True, trust_env=False) as client:
                response = client.post(server.url, content=b"tea", **options)
                return (response.history or [response])[0].extensions["idempotency"].key  # type: ignore[no-any-return]
        case "httpx-async":
            return asyncio.run(_post_async(server, **options))
        case _:
            with requests.Session() as session:
                session.trust_env = False
                session.mount(server.url, IdempotentAdapter(retry=AT_ONCE))
                found = call_of(session.post(server.url, data=b"tea", timeout=10, **options))
                return None if found is None else found.key


async def _post_async(server: Scripted, **options: Any) -> str:
    mounts = {server.url: AsyncIdempotentTransport(retry=AT_ONCE)}
    async with httpx.AsyncClient(mounts=mounts, follow_redirects=True, trust_env=False) as client:
        response = await client.post(server.url, content=b"tea", **options)
        return (response.history or [response])[0].extensions["idempotency"].key  # type: ignore[no-any-return]


@EACH
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "invoice-7"}], ids=["random", "given"])
def test_a_server_without_the_transport_is_not_shown_the_key(
    kind: str, headers: dict[str, str], servers: tuple[Scripted, Scripted]
) -> None:
    """The client itself sends the redirect, without a key."""
    mounted, other = servers
    mounted.script(503, Answer(307, {"Location": f"{other.url}/orders"}))
    other.script()

    key = post(kind, mounted, headers=headers)

    assert mounted.keys == [key, key]
    assert key == headers.get("Idempotency-Key", key)
    assert other.keys == [None]


@EACH
def test_a_redirect_that_comes_back_is_the_same_call(kind: str, servers: tuple[Scripted, Scripted]) -> None:
    """It has the first key again."""
    mounted, other = servers
    mounted.script(Answer(308, {"Location": f"{other.url}/orders"}))
    other.script(Answer(307, {"Location": f"{mounted.url}/orders"}))

    key = post(kind, mounted)

    assert mounted.keys == [key, key]
    assert other.keys == [None]


def test_extensions_of_two_calls_may_be_one_dictionary(servers: tuple[Scripted, Scripted]) -> None:
    """It is not changed, and each call has its own key."""
    mounted, _ = servers
    mounted.script()
    extensions = {"timeout": {"connect": 5.0, "read": 5.0, "write": 5.0, "pool": 5.0}}

    with IdempotentTransport() as transport:
        for _ in range(2):
            request = httpx.Request("POST", mounted.url)
            request.extensions = extensions
            transport.handle_request(request)

    assert len(set(mounted.keys)) == 2
    assert list(extensions) == ["timeout"]

"""A client that is generated from the served document."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openapi_python_client import Config, MetaType, generate
from openapi_python_client.config import ConfigFile
from pydantic import BaseModel

from idempotency import IdempotencyMiddleware, Policy
from idempotency.openapi import document
from tests.kit.served import served

NAME = "generated_shop_client"


class Order(BaseModel):
    item: str


class Receipt(BaseModel):
    number: int


def shop(made: list[str], mismatch_status: int = 409) -> FastAPI:
    """Make an application that counts its orders; a mismatch has a status that FastAPI does not use itself."""
    app = FastAPI()
    policy = Policy(required=True, mismatch_status=mismatch_status)
    app.add_middleware(IdempotencyMiddleware, store="memory://", policy=policy)

    @app.post("/orders", status_code=201, operation_id="create_order")
    async def create_order(order: Order) -> Receipt:
        made.append(order.item)
        return Receipt(number=len(made))

    document(app)
    return app


@pytest.fixture
def make_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Generate a client from the document at a URL, and import it."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(url: str) -> Any:
        source = tmp_path / "openapi.json"
        source.write_bytes(httpx.get(f"{url}/openapi.json").content)
        options = ConfigFile(post_hooks=[])
        config = Config.from_sources(options, MetaType.NONE, source, "utf-8", False, tmp_path / NAME)
        assert generate(config=config) == []
        return import_module(NAME)

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]


def test_a_generated_client_sends_the_key_and_gets_the_replay(make_client: Callable[[str], Any]) -> None:
    """The key is an argument that must be given; errors are objects with a code to branch on."""
    made: list[str] = []
    with served(shop(made)) as url, make_client(url).Client(base_url=url) as client:
        create = import_module(f"{NAME}.api.default.create_order").sync_detailed
        order = import_module(f"{NAME}.models").Order

        with pytest.raises(TypeError, match="idempotency_key"):
            create(client=client, body=order("tea"))
        first, again = [create(client=client, body=order("tea"), idempotency_key="k") for _ in range(2)]
        other = create(client=client, body=order("coffee"), idempotency_key="k")
        malformed = create(client=client, body=order("tea"), idempotency_key="a b")

    assert made == ["tea"]
    assert (first.status_code, first.parsed.number) == (201, 1)
    assert (again.status_code, again.parsed) == (201, first.parsed)
    assert (first.headers.get("idempotent-replayed"), again.headers["idempotent-replayed"]) == (None, "true")
    assert (other.status_code, other.parsed.code, other.parsed.retryable) == (409, "key-reused", False)
    assert (malformed.status_code, malformed.parsed.code) == (400, "key-invalid")


def test_a_generator_that_reads_one_media_type_does_not_see_ours_at_422(make_client: Callable[[str], Any]) -> None:
    """FastAPI's own comes first, and the client reads each 422 as one."""
    with served(shop([], mismatch_status=422)) as url:
        make_client(url)
        source = (Path(import_module(NAME).__path__[0]) / "api" / "default" / "create_order.py").read_text()

    assert "response_422 = HTTPValidationError.from_dict" in source
    assert "response_409 = IdempotencyProblem409.from_dict" in source

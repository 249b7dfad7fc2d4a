"""The code of the documents, run as it stands there but for the URLs of servers."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from textwrap import dedent
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from celery._state import _TLS

from idempotency import idempotent
from idempotency.outbox import Message, Outcome, Publisher, Refused, Sent
from idempotency.outbox.publishers import open_publisher
from idempotency.webhooks import sign
from tests.clients.senders import Answer, scripted
from tests.kit.servers import PgBouncerServer

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str) -> dict[str, list[str]]:
    """Return the Python blocks of a page by the heading above them."""
    found: dict[str, list[str]] = {}
    heading = ""
    for part in re.split(
        r"(^```python\n.*?^```$|^#+ [^\n]*$)", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL
    ):
        if part.startswith("#"):
            heading = part.lstrip("# ")
        elif part.startswith("```python"):
            found.setdefault(heading, []).append(part.removeprefix("```python\n").removesuffix("```"))
    return found


CLIENTS = blocks("clients.md")
CONSOLE = blocks("console.md")
CORS = blocks("cors.md")
CONTRACTS = blocks("contracts.md")
ENCRYPTION = blocks("encryption.md")
EVENTS = blocks("events.md")
FASTAPI = blocks("fastapi.md")
HTTP = blocks("http.md")
MESSAGES = blocks("messages.md")
OPENAPI = blocks("openapi.md")
OPERATIONS = blocks("operations.md")
PGBOUNCER = blocks("pgbouncer.md")
PROFILES = blocks("profiles.md")
PROJECTIONS = blocks("projections.md")
SAGAS = blocks("sagas.md")
TELEMETRY = blocks("telemetry.md")
STREAMS = blocks("streams.md")
TRANSACTIONS = blocks("transactions.md")
TUTORIAL = blocks("tutorial.md")
README = blocks("../README.md")
OUTBOX = blocks("outbox.md")
WEBHOOKS = blocks("webhooks.md")
WSGI = blocks("wsgi.md")
SETUP = "Code for each framework"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run blocks as one module, its databases in SQLite, and return its names; run again, they are added to it."""
    # Each is made the default of its process by being made.
    monkeypatch.setattr("dramatiq.broker.global_broker", None)
    monkeypatch.setattr("celery._state.default_app", None)
    monkeypatch.setattr("celery._state._tls", _TLS())

    module = ModuleType("shop")
    monkeypatch.setitem(sys.modules, "shop", module)

    def run(*sources: str) -> dict[str, Any]:
        for source in sources:
            source = re.sub(r"postgresql\+asyncpg://[^\"]*", f"sqlite+aiosqlite:///{tmp_path}/shop.db", source)
            source = re.sub(r"redis://[^\"]*", "memory://", source)
            source = re.sub(r"postgresql\+psycopg://[^\"]*", f"sqlite:///{tmp_path}/shop.db", source)
            exec(compile(source, "shop.py", "exec", dont_inherit=True), vars(module))
        return vars(module)

    return run


async def ends_at_sigterm(main: Callable[[], Awaitable[None]]) -> None:
    """Run the program of a worker, and send this process a signal, which the program handles from its begin on."""
    async with asyncio.timeout(30):
        running = asyncio.ensure_future(main())
        await asyncio.sleep(0)
        assert callable(signal.getsignal(signal.SIGTERM))
        signal.raise_signal(signal.SIGTERM)
        await running


def test_the_code_for_encryption_encrypts(run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A store with the key from the environment, and a policy that removes the number of a card."""
    from idempotency.stores.encryption import Encryption

    monkeypatch.setenv("IDEMPOTENCY_KEY", Encryption.new_key())
    [switch_on], [redact] = ENCRYPTION["Switch it on"], ENCRYPTION["Results that must not be stored at all"]

    names = run("async def app(scope, receive, send): ...", switch_on, redact)

    assert names["store"]._sealing.writer is names["encryption"]
    headers = [(b"x-card", b"4"), (b"a", b"b")]
    pairs, body = names["policy"].redact(200, headers, b"4111111111111111")
    assert (pairs, body) == ([(b"a", b"b")], b"...1111")


async def test_the_code_for_the_page_lets_operators_in(run: Callable[..., dict[str, Any]]) -> None:
    """Those of a group may see what is stuck, and nobody else."""
    names = run(*CONSOLE["With your own users, and an outbox"])
    await names["store"].create_schema()
    user: Any = None

    async def with_user(scope: Any, receive: Any, send: Any) -> None:
        await names["app"](scope | {"user": user}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(with_user), base_url="http://shop") as client:
        unknown = await client.get("/stuck/")
        user = SimpleNamespace(name="ada", groups={"operations"})
        known = await client.get("/stuck/")
    for each in ("store", "outbox"):
        await names[each].aclose()

    assert unknown.status_code == 404
    assert "ada (read only)" in known.text


async def test_the_shortest_code_for_the_page_asks_for_a_password(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser is asked for it; only the right one shows the page."""
    monkeypatch.setenv("STUCK_PASSWORD", "s3cret")
    names = run(*CONSOLE["The page of what is stuck"])
    await names["store"].create_schema()

    async with httpx.AsyncClient(transport=httpx.ASGITransport(names["app"]), base_url="http://shop") as client:
        answers = [
            await client.get("/stuck/", auth=auth)
            for auth in (None, ("ops", "other"), ("eve", "s3cret"), ("ops", "s3cret"))
        ]
    await names["store"].aclose()

    assert [answer.status_code for answer in answers] == [401, 401, 401, 200]
    assert answers[0].headers["www-authenticate"].startswith("Basic")
    assert "Held by the slot" not in answers[-1].text


async def test_the_code_for_pgbouncer_works_behind_one(postgres_url: str) -> None:
    """In its transaction mode, with fewer connections than calls, of two engines: each call has its effect once."""
    processes: list[dict[str, Any]] = [{}, {}]
    effects: Counter[str] = Counter()

    def charge_by(store: Any) -> Callable[[str], Awaitable[None]]:
        @idempotent(store, key=lambda key: key, name="charge")
        async def charge(key: str) -> None:
            effects[key] += 1

        return charge

    with PgBouncerServer(postgres_url, pool_mode="transaction") as bouncer:
        for names in processes:
            [block] = PGBOUNCER["PgBouncer"]
            exec(compile(re.sub(r"postgresql\+asyncpg://[^\"]*", bouncer.url, block), "shop.py", "exec"), names)
        await processes[0]["store"].create_schema()
        one, other = (charge_by(names["store"]) for names in processes)
        keys = [f"key {number}" for number in range(20)]
        await asyncio.gather(*map(one, keys[:10]), *map(other, keys[10:]))
        await asyncio.gather(*map(other, keys[:10]), *map(one, keys[10:]))
        for names in processes:
            await names["engine"].dispose()

    assert effects == Counter(keys)


async def test_the_code_for_cors_lets_a_page_send_a_key(run: Callable[..., dict[str, Any]]) -> None:
    """The preflight of the browser allows it, and an answer of ours has the headers too."""
    app = run(*CORS["Starlette and FastAPI"])["app"]
    origin = {"origin": "https://shop.example"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "idempotency-key"}

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api") as client:
        preflight = await client.options("/orders", headers=origin | asked)
        refused = await client.post("/orders", headers=origin | {"idempotency-key": "x" * 256})

    assert preflight.status_code == 200
    assert refused.status_code == 400
    for answer in (preflight, refused):
        assert answer.headers["access-control-allow-origin"] == "https://shop.example"
    assert "Retry-After" in refused.headers["access-control-expose-headers"]


def test_the_code_for_cors_in_flask_lets_a_page_send_a_key(run: Callable[..., dict[str, Any]]) -> None:
    """The preflight of the browser allows it, and a page reads when a key is malformed."""
    client = run(*CORS["Flask and Django"])["app"].test_client()
    origin = {"Origin": "https://shop.example"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "idempotency-key"}

    preflight = client.options("/orders", headers=origin | asked)
    refused = client.post("/orders", headers=origin | {"Idempotency-Key": "x" * 256})

    assert preflight.headers["Access-Control-Allow-Headers"] == "idempotency-key"
    assert refused.status_code == 400
    assert "Retry-After" in refused.headers["Access-Control-Expose-Headers"]
    for answer in (preflight, refused):
        assert answer.headers["Access-Control-Allow-Origin"] == "https://shop.example"


@pytest.mark.parametrize("framework", [heading for heading in MESSAGES if heading != SETUP])
def test_the_code_for_each_framework_is_accepted(framework: str, run: Callable[..., dict[str, Any]]) -> None:
    """The library, and the framework, take what the page on messages shows."""
    run(*MESSAGES[SETUP], *MESSAGES[framework])


def test_the_code_for_lambda_handles_a_record_once(run: Callable[..., dict[str, Any]]) -> None:
    """A record that Lambda passes twice is one invoice, and both batches are done."""
    from sqlalchemy import func, select

    names = run(*MESSAGES[SETUP], *MESSAGES["AWS Lambda behind SQS"])
    names["Base"].metadata.create_all(names["sync_engine"])
    record = {
        "messageId": "1",
        "body": json.dumps({"order": "A-1"}),
        "eventSourceARN": "arn:aws:sqs:eu-north-1:1:orders",
        "attributes": {"ApproximateReceiveCount": "1"},
    }

    answers = [names["lambda_handler"]({"Records": [record]}, None) for _ in range(2)]

    with names["SyncSession"]() as session:
        assert session.scalar(select(func.count()).select_from(names["Invoice"])) == 1
    names["sync_engine"].dispose()
    assert answers == [{"batchItemFailures": []}] * 2


@pytest.mark.parametrize("framework", ["Starlette", "FastAPI", "Litestar", "Quart"])
async def test_the_code_for_each_web_framework_replays_a_response(
    framework: str, run: Callable[..., dict[str, Any]]
) -> None:
    """A request that is sent twice is answered by the handler, and then by the record."""
    app = run(*HTTP[framework])["app"]

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        first, second = [await client.post("/orders", headers={"Idempotency-Key": "1f5a"}) for _ in range(2)]

    assert (first.status_code, second.status_code) == (201, 201)
    assert second.json() == first.json()
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"


def test_the_code_for_django_replays_a_response(tmp_path: Path) -> None:
    """The same in Django, whose settings are those of a process."""
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "asgi.py").write_text(HTTP["Django"][0].replace("redis://localhost:6379", "memory://"))
    (shop / "settings.py").write_text("SECRET_KEY = 'x'\nALLOWED_HOSTS = ['*']\nROOT_URLCONF = 'shop.urls'\n")
    (shop / "urls.py").write_text(
        dedent(
            """\
            from django.http import JsonResponse
            from django.urls import path
            from idempotency import current

            urlpatterns = [path("orders", lambda _: JsonResponse({"order": current().derive("order")}, status=201))]
            """
        )
    )
    program = dedent(
        """\
        import asyncio, httpx
        from shop.asgi import application

        async def main():
            transport = httpx.ASGITransport(application)
            async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
                for _ in range(2):
                    answer = await client.post("/orders", headers={"Idempotency-Key": "1f5a"})
                    print(answer.status_code, answer.headers.get("idempotent-replayed"))

        asyncio.run(main())
        """
    )

    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )

    assert ran.stdout.split("\n") == ["201 None", "201 true", ""], ran.stderr


def test_the_code_for_flask_replays_a_response(run: Callable[..., dict[str, Any]]) -> None:
    """A request that is sent twice is answered by the handler, and then by the record; so is one in a transaction."""
    from sqlalchemy import Column, Integer
    from sqlalchemy.orm import DeclarativeBase

    class Base(DeclarativeBase):
        pass

    class Refund(Base):
        __tablename__ = "refunds"
        id = Column(Integer, primary_key=True)
        order = Column(Integer)

    client = run(*WSGI["Flask"])["app"].test_client()
    first, second = [client.post("/orders", headers={"Idempotency-Key": "1f5a"}) for _ in range(2)]
    names = run(*WSGI["Flask"], *WSGI["Effect and response in one transaction"])
    names["Refund"] = Refund
    Base.metadata.create_all(names["engine"])
    client = names["app"].test_client()
    refunds = [client.post("/refunds", headers={"Idempotency-Key": "2"}) for _ in range(2)]
    counted = client.get("/refunds")
    names["engine"].dispose()

    assert (first.status_code, second.status_code, second.json) == (201, 201, first.json)
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert [each.headers.get("idempotent-replayed") for each in refunds] == [None, "true"]
    assert counted.json == {"refunds": 1}


def test_the_code_for_django_under_wsgi_replays_a_response(tmp_path: Path) -> None:
    """The same in Django, whose settings are those of a process."""
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "wsgi.py").write_text(WSGI["Django"][0].replace("redis://localhost:6379", "memory://"))
    (shop / "settings.py").write_text("SECRET_KEY = 'x'\nALLOWED_HOSTS = ['*']\nROOT_URLCONF = 'shop.urls'\n")
    (shop / "urls.py").write_text(
        dedent(
            """\
            from django.http import JsonResponse
            from django.urls import path

            def order(request):
                return JsonResponse({"order": request.META["idempotency"].derive("order")}, status=201)

            urlpatterns = [path("orders", order)]
            """
        )
    )
    program = dedent(
        """\
        import httpx
        from shop.wsgi import application

        with httpx.Client(transport=httpx.WSGITransport(application), base_url="http://shop") as client:
            for _ in range(2):
                answer = client.post("/orders", headers={"Idempotency-Key": "1f5a"})
                print(answer.status_code, answer.headers.get("idempotent-replayed"))
        """
    )

    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )

    assert ran.stdout.split("\n") == ["201 None", "201 true", ""], ran.stderr


@pytest.mark.parametrize("heading", ["In your code", "Whose key", "How long"])
def test_the_other_code_on_http_is_accepted(heading: str, run: Callable[..., dict[str, Any]]) -> None:
    """The library takes the rest of what the page on HTTP shows."""
    run(*HTTP["FastAPI"], *HTTP[heading])


@pytest.mark.parametrize(
    ("heading", "number", "mismatch", "code", "running"),
    [
        ("The options", 0, 422, ["error"], "1"),
        ("The options", 1, 422, None, "1"),
        ("Agentic Commerce Protocol", 0, 422, ["code"], "1"),
        ("Agentic Commerce Protocol", 1, 409, ["code"], "1"),
        ("APIs like Stripe's", 0, 400, ["error", "code"], "1"),
        ("APIs like Stripe's", 1, 400, ["error", "code"], "1"),
        ("APIs like those of hono-idempotency", 0, 422, ["code"], "1"),
    ],
)
async def test_the_code_for_each_profile_answers_in_its_form(
    heading: str, number: int, mismatch: int, code: list[str] | None, running: str, run: Callable[..., dict[str, Any]]
) -> None:
    """A reused key and a running request have the statuses of the page, and a code where it says."""
    names = run(*PROFILES["Answers in the form of your API"], PROFILES[heading][number])
    begun, finish = asyncio.Event(), asyncio.Event()

    @names["api"].post("/slow")
    async def slow() -> None:
        begun.set()
        await finish.wait()

    key = {"Idempotency-Key": "1f5a"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(names["app"]), base_url="http://shop") as client:
        first, replay, other = [await client.post("/orders", headers=key, json={"item": item}) for item in "aab"]
        task = asyncio.create_task(client.post("/slow", headers={"Idempotency-Key": "2"}))
        await begun.wait()
        busy = await client.post("/slow", headers={"Idempotency-Key": "2"})
        finish.set()
        await task

    assert (first.status_code, replay.json(), replay.headers["idempotent-replayed"]) == (201, {"item": "a"}, "true")
    assert (other.status_code, busy.status_code, busy.headers["retry-after"]) == (mismatch, 409, running)
    texts = {"FINGERPRINT_MISMATCH", "idempotency_conflict", "idempotency_key_reused", "key-reused"}
    if code is None:
        assert other.text == "<error>key-reused</error>"
    else:
        found = other.json()
        for member in code:
            found = found[member]
        assert found in texts


async def test_the_code_for_one_transaction_has_one_effect(run: Callable[..., dict[str, Any]]) -> None:
    """What is requested, delivered or called twice is one order, by each block of the page on transactions."""
    from sqlalchemy import func, select

    setup, (starlette, fastapi) = TRANSACTIONS["One transaction"], TRANSACTIONS["HTTP"]
    names = run(*setup)
    names["Base"].metadata.create_all(names["sync_engine"])
    names["sync_store"].create_schema_sync()

    def orders() -> int:
        with names["SyncSession"]() as session:
            return session.scalar(select(func.count()).select_from(names["Order"])) or 0

    counted = []
    for block, request in ((starlette, {"json": {"item": "tea"}}), (fastapi, {"params": {"item": "tea"}})):
        app = run(block)["app"]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            key = {"Idempotency-Key": f"{len(counted)}"}
            answers = [await client.post("/orders", headers=key, **request) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [201, 201]
        counted.append(orders())
    consumer = run(*TRANSACTIONS["Messages"])["on_order_placed"]
    for _ in range(2):
        await consumer.deliver({"id": "1", "item": "tea"})
    counted.append(orders())
    functions = run(*TRANSACTIONS["Functions"])
    assert functions["invoice"]("A-1") == functions["invoice"]("A-1")
    counted.append(orders())
    receipts = [functions["charge"]("A-1", 3) for _ in range(2)]
    names["sync_engine"].dispose()
    await names["engine"].dispose()

    assert counted == [1, 2, 3, 4]
    assert receipts == [functions["Receipt"]("A-1", 3)] * 2


async def sent(app: Any, *requests: tuple[str, dict[str, str]]) -> list[httpx.Response]:
    """Send requests for tea to ``/orders``, and return their answers."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        return [
            await client.request(method, "/orders", params={"item": "tea"}, headers=headers)
            for method, headers in requests
        ]


@pytest.mark.parametrize(
    "heading", ["One dependency for reads and writes", "Synchronous SQLAlchemy and `def` endpoints"]
)
async def test_the_code_for_a_session_has_one_order(
    heading: str, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """A repeated order is one, one without a key another, and both are read by the same dependency."""
    from sqlalchemy import create_engine

    names = run(*FASTAPI[heading])
    tables = create_engine(f"sqlite:///{tmp_path}/shop.db")
    names["Base"].metadata.create_all(tables)
    tables.dispose()

    key = {"Idempotency-Key": "1f5a"}
    first, second, unkeyed, listed = await sent(names["app"], ("POST", key), ("POST", key), ("POST", {}), ("GET", {}))
    closed = names["engine"].dispose()
    if closed is not None:
        await closed

    assert [each.status_code for each in (first, second, unkeyed)] == [201] * 3
    assert (first.json(), second.json()) == ({"id": 1, "item": "tea"}, {"id": 1, "item": "tea"})
    assert second.headers["idempotent-replayed"] == "true"
    assert listed.json() == ["tea", "tea"]


async def test_a_revoked_token_gets_no_replay(run: Callable[..., dict[str, Any]]) -> None:
    """The middleware authenticates first: a revoked token is refused, and a new one of the same user is replayed to."""
    [setup], [recipe] = (
        FASTAPI["Synchronous SQLAlchemy and `def` endpoints"],
        FASTAPI["Authentication: no replay for a revoked token"],
    )
    names = run(setup, recipe)
    names["Base"].metadata.create_all(names["engine"])
    key = {"Idempotency-Key": "1f5a", "Authorization": "Bearer token-of-ann"}
    new = {**key, "Authorization": "Bearer another"}

    [first] = await sent(names["app"], ("POST", key))
    names["TOKENS"] |= {"another": names["TOKENS"].pop("token-of-ann")}
    revoked, again, unkeyed = await sent(
        names["app"], ("POST", key), ("POST", new), ("POST", {"Authorization": key["Authorization"]})
    )
    names["engine"].dispose()

    assert (first.status_code, first.json()) == (201, {"item": "tea", "user": "ann"})
    assert (revoked.status_code, unkeyed.status_code) == (401, 401)
    assert (again.json(), again.headers["idempotent-replayed"]) == (first.json(), "true")


async def test_the_code_for_tenants_has_an_effect_for_each(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """A function that is called again for a tenant is one order, in the schema of that tenant."""
    from sqlalchemy import event, func, select

    from idempotency.stores.sql import SQLStore

    schemas = ("north", "south")
    names = run(*TRANSACTIONS["One transaction"], *TRANSACTIONS["Functions"], *TRANSACTIONS["Schemas and tenants"])
    engine = names["engine"]

    @event.listens_for(engine.sync_engine, "connect")
    def attach(opened: Any, _: object) -> None:
        for schema in schemas:
            opened.cursor().execute(f"ATTACH '{tmp_path / schema}' AS {schema}")

    for schema in schemas:
        of_tenant = engine.execution_options(schema_translate_map={None: schema})
        async with of_tenant.begin() as connection:
            await connection.run_sync(names["Base"].metadata.create_all)
        await SQLStore(of_tenant).create_schema()
    for schema in (*schemas, *schemas):
        names["tenant"].set(schema)
        await names["order"]("tea")

    counted = []
    for schema in schemas:
        names["tenant"].set(schema)
        async with names["TenantSessions"]() as session:
            counted.append(await session.scalar(select(func.count()).select_from(names["Order"])))
    names["sync_engine"].dispose()
    await engine.dispose()

    assert counted == [1, 1]


async def test_the_gauges_of_an_outbox_are_read(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """One message is due, and no relay runs."""
    from sqlalchemy.ext.asyncio import create_async_engine

    from idempotency.outbox import Outbox

    names = run(*OPERATIONS["Gauges"])
    await names["operations"].create_schema()
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db")
    async with engine.begin() as connection:
        await Outbox().emit(connection, aggregate_type="order", aggregate_id=7, type="Placed", payload={})
    await engine.dispose()

    gauges = await names["gauges"]()

    assert 0 <= gauges.pop("outbox_oldest_age_seconds") < 60
    assert gauges == {
        "outbox_messages_due": 1,
        "outbox_messages_scheduled": 0,
        "outbox_messages_blocked": 0,
        "outbox_messages_dead": 0,
        "outbox_relays": 0,
    }
    await names["operations"].aclose()


async def test_the_code_for_the_status_of_a_saga_answers_202(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer names the URL, where the saga is pending too; a failed one is answered in its own way."""
    from idempotency.saga import SagaOperations

    monkeypatch.setenv("STATUS_SECRET", "a secret of thirty-two characters")
    names = run(*OPERATIONS["The status of a long saga"])

    transport = httpx.ASGITransport(names["app"])
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        first = await client.post("/orders")
        second = await client.get(first.headers["location"])
        await SagaOperations(names["store"]).cancel("deliver", "order-7")
        failed = await client.post("/orders")

    assert [(each.status_code, each.json()) for each in (first, second)] == [(202, {"status": "pending"})] * 2
    assert (failed.status_code, failed.json()) == (422, {"failed": "idempotency.saga.errors.CancelledByOperatorError"})
    await names["store"].aclose()


async def test_the_code_for_openapi_describes_the_key(run: Callable[..., dict[str, Any]]) -> None:
    """Both frameworks serve the parameter, and a document that is given gets it too."""
    served = []
    for framework, path in (("FastAPI", "/openapi.json"), ("Litestar", "/schema/openapi.json")):
        transport = httpx.ASGITransport(run(*OPENAPI[framework])["app"])
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            served.append((await client.get(path)).json())
    names = run("openapi = {'openapi': '3.1.0', 'paths': {'/orders': {'post': {}}}}", *OPENAPI["Any other document"])

    documents = [*served, names["described"]]
    found = [each["components"]["parameters"]["IdempotencyKey"] for each in documents]
    assert [each["required"] for each in found] == [True, True, False]


def test_the_urls_of_brokers_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each URL of the table names a publisher, which connects only when it publishes."""
    monkeypatch.setenv("IDEMPOTENCY_WEBHOOK_SECRETS", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    table = (DOCS / "outbox.md").read_text().partition("\n## Publish\n")[2].partition("\n\nEvery message")[0]

    made = [type(open_publisher(url)).__name__ for url in re.findall(r"`([a-z+]+://[^`]+)`", table)]

    assert made == [
        "AioPikaPublisher",
        "NatsPublisher",
        "AiokafkaPublisher",
        "ConfluentPublisher",
        "RedisPublisher",
        "SQSPublisher",
        "CeleryPublisher",
        "WebhookPublisher",
    ]


async def test_the_code_of_a_publisher_publishes(run: Callable[..., dict[str, Any]]) -> None:
    """The skeleton is a publisher for a relay, once its ``send`` answers."""
    names = run(*OUTBOX["A publisher of your own"])

    class Printing(names["MyPublisher"]):  # type: ignore[misc]
        async def send(self, message: Message) -> Outcome:
            return Sent() if message.wire_headers() == {"id": "1", "eventType": "T"} else Refused("headers")

    message = Message(id="1", aggregate_type="order", aggregate_id="8", type="T", payload=b"{}")
    publisher: Publisher = Printing()
    assert list(await publisher.publish([message])) == [Sent()]
    assert publisher.delivery_timeout == 15


async def test_the_code_for_webhooks_receives_and_sends(run: Callable[..., dict[str, Any]]) -> None:
    """A webhook is taken by the receiver, or by the handler of one's own, and a message without an endpoint is sent."""
    names = run(*WEBHOOKS["Receive"], *WEBHOOKS["In a handler of your own"], *WEBHOOKS["Send"])
    [shop_secret], [account_secret] = names["ENDPOINTS"]["7"].secrets, names["SECRETS"]["7"]
    message = Message(id="1", aggregate_type="order", aggregate_id="8", type="OrderPlaced", payload=b"{}")

    async with httpx.AsyncClient(transport=httpx.ASGITransport(names["app"]), base_url="http://shop") as client:
        statuses = []
        for path, secret in (("shop", shop_secret), ("7", account_secret)):
            for signed in (sign("msg_1", b"{}", [secret]), {}):
                answer = await client.post(f"/webhooks/{path}", headers=signed, content=b"{}")
                statuses.append(answer.status_code)
    outcomes = await names["publisher"].publish([message])
    await names["publisher"].aclose()

    assert statuses == [204, 400, 204, 400]
    assert list(outcomes) == [Sent()]


async def test_the_code_for_the_first_saga_books_and_undoes(run: Callable[..., dict[str, Any]]) -> None:
    """Each call of a provider has a key of its own; where the card is refused, hotel and flight are cancelled.

    What the bank has said is shown where it is asked for, and a process that sweeps ends at SIGTERM.
    """
    from idempotency.saga import SagaFailedError, SagaOperations

    names = run(*SAGAS["Five minutes to the first saga"])
    calls: list[str] = []
    keys: set[str] = set()

    class Client:
        def __init__(self, name: str) -> None:
            self.name = name

        async def book(self, to: str, idempotency_key: str) -> str:
            keys.add(idempotency_key)
            calls.append(f"{self.name} to {to}")
            return f"{self.name}-1"

        async def charge(self, to: str, idempotency_key: str) -> str:
            keys.add(idempotency_key)
            if to == "Oslo":
                raise ValueError("no money")
            return "paid"

        async def cancel(self, booking: str) -> None:
            calls.append(f"cancel {booking}")

    names.update({name: Client(name) for name in ("flights", "hotels", "bank")})
    await names["store"].create_saga_schema()

    assert [await names["book_trip"]("Rome", key="7") for _ in range(2)] == ["flights-1", "flights-1"]
    with pytest.raises(SagaFailedError) as failed:
        await names["book_trip"]("Oslo", key="8")

    failure: Any = failed.value.failure
    assert (failure.type, failure.step) == ("ValueError", "charge")
    assert calls == [
        *("flights to Rome", "hotels to Rome"),
        *("flights to Oslo", "hotels to Oslo", "cancel hotels-1", "cancel flights-1"),
    ]
    assert len(keys) == 6
    shown = await SagaOperations(names["store"]).inspect("book-trip", "8", show=True)
    assert shown is not None
    assert [each.value for each in shown.facts if each.name == "charge"] == [
        {"type": "ValueError", "message": "no money"}
    ]
    await ends_at_sigterm(names["main"])
    await names["store"].aclose()


def test_the_code_for_named_calls_sends_one_key(run: Callable[..., dict[str, Any]]) -> None:
    """An invoice that is sent twice, and a reminder that is tried twice, have one key each."""
    with scripted() as server:
        server.script(200, 200, Answer(503, {"Retry-After": "0"}))
        names = run(
            *(each.replace("https://api.example", server.url) for each in CLIENTS["A call that survives the process"])
        )
        for _ in range(2):
            names["send_invoice"](7, {"sum": 100})
        _, attempts = names["send_reminder"](7, {"sum": 100})

        first, again, *reminders = server.keys
        names["client"].close()
        names["session"].close()

    assert first == again
    assert attempts == len(reminders) == 2
    assert len({first, *reminders}) == 2


def test_the_code_of_a_hook_hears_of_a_lost_lease(run: Callable[..., dict[str, Any]]) -> None:
    """The function runs under it, and the level of the log is the logger's own."""
    import logging

    from idempotency.events import Event

    hook, log = (block for several in EVENTS.values() for block in several)
    level = logging.getLogger("idempotency").level
    names = run(hook, log)
    logging.getLogger("idempotency").setLevel(level)

    assert [names["charge"]("7") for _ in range(2)] == ["charged 7"] * 2
    assert names["lost"] == []
    names["note"](Event(kind="lease-lost", operation="charge", surface="function", route="charge"))
    assert names["lost"] == ["function charge"]


async def test_the_code_for_telemetry_exports(run: Callable[..., dict[str, Any]]) -> None:
    """The route is on the page of metrics, the watch reads its gauges, and a consumer handles a message."""
    from prometheus_client import REGISTRY

    before = {*REGISTRY._collector_to_names}
    try:
        names = run(*TELEMETRY["Prometheus"])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(names["app"]), base_url="http://shop") as client:
            for _ in range(2):
                await client.post("/orders/7", headers={"Idempotency-Key": "1"})
            metrics = (await client.get("/metrics/")).text
    finally:
        for collector in {*REGISTRY._collector_to_names} - before:
            REGISTRY.unregister(collector)
    for verdict in ("stored", "replayed"):
        labels = f'route="POST /orders/{{number}}",surface="http",verdict="{verdict}"'
        assert f"idempotency_operations_total{{{labels}}} 1.0" in metrics

    names = run(*TELEMETRY["Gauges"], *TELEMETRY["OpenTelemetry"], *TELEMETRY["Traces"])
    await names["store"].create_schema()
    await names["store"].create_saga_schema()
    await names["outbox"].create_schema()
    async with names["lifespan"](names["app"]):
        while len(names["watch"].measurements()) == 1:
            await asyncio.sleep(0.005)
    message = SimpleNamespace(headers={"id": "1"})
    assert [type(await names["on_order"].deliver(message)).__name__ for _ in range(2)] == ["Done", "Replayed"]
    await names["store"].aclose()
    await names["outbox"].aclose()


async def test_the_code_of_the_tutorial_orders_once(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By each of its two applications: one order for two requests, and the answers that the page promises."""
    monkeypatch.chdir(tmp_path)
    [listed], [transactional] = TUTORIAL["1. Protect it"], TUTORIAL["3. Close the gap between effect and record"]
    for key, source in (("1", listed), ("2", transactional)):
        names = run(source)
        app = names["app"]
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client,
        ):
            answers = [
                await client.post("/orders", params={"item": item}, headers={"Idempotency-Key": sent})
                for item, sent in (("tea", key), ("tea", key), ("coffee", key), ("tea", "k" * 300))
            ]
        first, second, reused, malformed = answers
        assert (first.status_code, first.json()) == (201, {"order": 1, "item": "tea"})
        assert "idempotent-replayed" not in first.headers
        assert (second.json(), second.headers["idempotent-replayed"]) == (first.json(), "true")
        assert (reused.status_code, reused.json()["code"]) == (422, "key-reused")
        assert (malformed.status_code, malformed.json()["code"]) == (400, "key-invalid")
    await names["engine"].dispose()


async def test_the_code_of_the_readme_orders_once(run: Callable[..., dict[str, Any]]) -> None:
    """Its two applications, and its task of Celery, with the imports that its comments name."""
    from sqlalchemy import func, select

    setup = run(*TRANSACTIONS["One transaction"])
    setup["Base"].metadata.create_all(setup["sync_engine"])
    [simple], [in_transaction] = README["idempotency"], README["In your database's transaction"]
    imports = """
from typing import Annotated
from celery import Celery
from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from idempotency.adapters.celery import idempotent_task
from idempotency.adapters.fastapi import session_of
from idempotency.stores.sql import SQLStore
app, celery = FastAPI(), Celery("shop")
"""
    run(imports, simple, *README["Messages, sagas, tools"])
    names = run(imports, in_transaction)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(names["app"]), base_url="http://shop") as client:
        for _ in range(2):
            answer = await client.post("/orders", params={"item": "tea"}, headers={"Idempotency-Key": "1"})
            assert answer.status_code == 200

    async with names["Session"]() as session:
        assert await session.scalar(select(func.count()).select_from(names["Order"])) == 1
    names["sync_engine"].dispose()
    await names["engine"].dispose()


async def test_the_code_for_streams_appends_and_follows(
    run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is withdrawn is an event, what is not covered is none, and an old event is read by the newer code."""
    from idempotency.streams import Position, Streams, Versioned

    [append], [upcast], [follow] = (
        STREAMS[each] for each in ("Append and load", "Types that change", "Read all events")
    )
    names = run(append, *STREAMS["In an endpoint"])
    events, engine = names["events"], names["engine"]
    await events.create_schema(engine)
    assert await names["open_account"]("account-7", 80) == 1
    await names["withdraw"]("account-7", 30)
    async with names["Session"]() as session:
        times = [datetime.fromtimestamp(each.at, UTC) async for each in events.read(session, "account-7")]
    before, after = times[0] - timedelta(seconds=1), times[1]
    assert [await names["balance_at"]("account-7", time) for time in (before, after)] == [0, 50]
    with pytest.raises(ValueError, match="not covered"):
        await names["withdraw"]("account-7", 60)
    assert str(await run(follow)["follow"](Position())) == "0.2"
    run(upcast)

    @dataclass
    class Old:
        cents: int

    async with names["Session"].begin() as session:
        await Streams([Versioned(Old, name="Withdrawn")]).append(session, "account-8", [Old(5)])
    await names["follow"](Position(0, 2))
    await engine.dispose()

    assert capsys.readouterr().out.splitlines() == [
        "account-7 1 Deposited(amount=80)",
        "account-7 2 Withdrawn(amount=30)",
        "account-8 1 Withdrawn(amount=5)",
    ]


async def test_the_code_for_projections_reads_what_was_written(run: Callable[..., dict[str, Any]]) -> None:
    """An order that was placed is in the list of each version, and a message of a partition is one invoice."""
    from types import SimpleNamespace

    from sqlalchemy import text

    from idempotency.projections import create_projections_schema

    names = run(*(block for heading in PROJECTIONS for block in PROJECTIONS[heading]))
    engine, first, second = names["engine"], names["order_list"], names["order_list_2"]
    await names["orders"].create_schema(engine)
    await create_projections_schema(engine)
    async with engine.begin() as connection:
        for table in ("order_list_1 (id, item)", "order_list_2 (id, item, length)", "invoice (id)"):
            await connection.execute(text(f"CREATE TABLE {table}"))
    await first.catch_up()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(names["app"]), base_url="http://shop") as client:
        token = (await client.post("/orders")).headers["sync-token"]
        late = await client.get("/orders", headers={"Sync-Token": token, "Prefer": "wait=0"})
        await first.catch_up()
        read = await client.get("/orders", headers={"Sync-Token": token})
    await second.rebuild()
    for offset in (1, 1):
        await names["on_message"](SimpleNamespace(topic="orders", partition=3, offset=offset, value="order-7"))
    async with engine.connect() as connection:
        invoices = (await connection.execute(text("SELECT count(*) FROM invoice"))).scalar_one()
    found = await names["read_orders"]()
    await ends_at_sigterm(names["main"])
    await second.drop(1)
    await engine.dispose()

    assert (late.status_code, read.json()) == (503, 1)
    assert ([tuple(row) for row in found], invoices) == ([("order-7",)], 1)


async def test_the_code_for_contracts_runs(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """A contract of two versions, a table that is filled, and a price that is compared."""
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

    from idempotency.projections import create_projections_schema

    names = run(*(block for found in CONTRACTS.values() for block in found))
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db")
    await create_projections_schema(engine)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE orders (id INTEGER PRIMARY KEY, price INT, count INT, total INT)"))
        await connection.execute(text("INSERT INTO orders (id, price, count) VALUES (1, 5, 2), (2, 3, 1)"))

    async def price(order: int) -> int:
        return order * 2

    await names["main"](async_sessionmaker(engine))
    async with engine.connect() as connection:
        totals = (await connection.execute(text("SELECT total FROM orders ORDER BY id"))).scalars().all()
    await engine.dispose()

    assert [(each.name, each.version) for each in names["contracts"]] == [("type Paid", 2)]
    assert [each.name for each in names["of_the_trip"]] == [
        "arguments of book-trip",
        "arguments of the undo of step flight of book-trip",
        "result of book-trip",
        "result of step flight of book-trip",
    ]
    assert names["paid"].load(1, b'{"euros":5}') == names["Paid"](500)
    assert totals == [10, 3]
    assert await names["price_of"](3, price, price) == 6

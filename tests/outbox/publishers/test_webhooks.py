"""Messages that go to endpoints as webhooks."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from idempotency import ConfigurationError
from idempotency.outbox import Outbox, PollingRelay
from idempotency.outbox.publisher import Outcome, Refused, RetryLater, Sent
from idempotency.outbox.publishers import open_publisher
from idempotency.outbox.publishers._webhook_answers import read_retry_after
from idempotency.outbox.publishers._webhook_pauses import Pauses
from idempotency.outbox.publishers.webhooks import SECRETS, WebhookPublisher
from idempotency.stores.memory import MemoryStore
from idempotency.testing import ManualClock, PublisherContract, Received
from idempotency.testing.publishers import Receive, new_message
from idempotency.webhooks import Endpoint, WebhookReceiver, standard_webhooks_schedule, verify
from tests.kit.asgi_calls import Effects, read, respond
from tests.kit.certificates import self_signed
from tests.kit.served import served
from tests.kit.servers import free_port, with_port
from tests.kit.tcp_proxy import Proxy
from tests.outbox.publishers.faults import BehindProxy

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
LOOPBACK = ("127.0.0.0/8",)


@dataclass
class Arrived:
    """One attempt, as an endpoint received it."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Endpoints:
    """An application that keeps what it is sent, and answers 204, or as the test says by path.

    ``together``: nothing is answered before so many are under way.
    """

    arrived: list[Arrived] = field(default_factory=list)
    answers: dict[str, tuple[int, list[tuple[bytes, bytes]], bytes]] = field(default_factory=dict)
    hang: set[str] = field(default_factory=set)
    together: int = 0
    full: asyncio.Event = field(default_factory=asyncio.Event)
    at_once: int = 0
    most_at_once: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            body = await read(receive)
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            self.arrived.append(Arrived(scope["path"], headers, body))
            if scope["path"] in self.hang:
                await receive()
            if self.at_once >= self.together:
                self.full.set()
            await self.full.wait()
            status, fields, content = self.answers.get(scope["path"], (204, [], b""))
            await respond(send, status, content, fields)
        finally:
            self.at_once -= 1


class Server:
    """One server for all tests: the first segment of a path says of which."""

    def __init__(self) -> None:
        self.of_tests: list[Endpoints] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        _, number, rest = scope["path"].split("/", 2)
        await self.of_tests[int(number)]({**scope, "path": f"/{rest}"}, receive, send)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Server, str]]:
    server = Server()
    with served(server) as url:
        yield server, url


@pytest.fixture
def endpoints(server: tuple[Server, str]) -> Endpoints:
    endpoints = Endpoints()
    server[0].of_tests.append(endpoints)
    return endpoints


@pytest.fixture
def url(server: tuple[Server, str], endpoints: Endpoints) -> str:
    return f"{server[1]}/{server[0].of_tests.index(endpoints)}"


@asynccontextmanager
async def opened(endpoint: Any, **options: Any) -> AsyncIterator[WebhookPublisher]:
    publisher = WebhookPublisher(endpoint, **{"secrets": [SECRET], "allow": LOOPBACK, **options})
    yield publisher
    await publisher.aclose()


async def outcome_at(endpoint: Any, **options: Any) -> Outcome:
    """Publish one message."""
    async with opened(endpoint, **options) as publisher:
        [outcome] = await publisher.publish([new_message()])
    return outcome


class TestContract(BehindProxy, PublisherContract):
    carries_keys = False
    carries_tombstones = False
    unroutable = RetryLater
    header_value: ClassVar[str] = "Zürich, 7 €"

    @pytest.fixture
    def broker_port(self, url: str) -> int:
        return urlsplit(url).port or 0

    @pytest.fixture
    async def publisher(
        self, request: pytest.FixtureRequest, url: str, endpoints: Endpoints, proxy: Proxy
    ) -> AsyncIterator[WebhookPublisher]:
        endpoints.answers["/nowhere"] = (404, [], b"")
        place = with_port(url, proxy.port)
        # Only one test waits for it. In the others a busy machine has its time.
        longest = 1 if "hangs" in request.node.name else 30
        async with opened(lambda message: f"{place}/{message.aggregate_type}", delivery_timeout=longest) as publisher:
            yield publisher

    @pytest.fixture
    def too_large(self) -> int:
        return 1_000_000

    @pytest.fixture
    def received(self, endpoints: Endpoints) -> Receive:
        ours = {"host", "content-length", "content-type", "user-agent", "connection", "accept", "accept-encoding"}

        async def received(count: int) -> list[Received]:
            arrived = [each for each in endpoints.arrived if each.path == "/order"]
            assert len(arrived) >= count
            return [
                Received(
                    id=verify(each.headers, each.body, [SECRET]).id,
                    key=None,
                    headers={
                        "eventType" if name == "eventtype" else name: value
                        for name, value in each.headers.items()
                        if name not in ours and not name.startswith("webhook-")
                    },
                    payload=each.body,
                )
                for each in arrived
            ]

        return received


async def test_each_attempt_is_signed_anew_under_one_id(url: str, endpoints: Endpoints) -> None:
    """The id stays, the time is that of the attempt, and every secret of the endpoint has signed it."""
    message, before = new_message(payload=b'{"total": 7}'), int(time.time())

    async with opened(Endpoint(f"{url}/hooks?account=7", [OTHER, SECRET])) as publisher:
        for _ in range(2):
            assert list(await publisher.publish([message])) == [Sent()]

    assert len(endpoints.arrived) == 2
    for each in endpoints.arrived:
        assert each.headers["content-type"] == "application/json"
        for secret in (OTHER, SECRET):
            verified = verify(each.headers, each.body, [secret])
            assert verified.id == message.id
            assert before <= verified.timestamp <= time.time()


async def test_published_twice_takes_effect_once_at_a_receiver() -> None:
    """Outbox, webhook, receiver: nothing is written by hand between them."""
    app = Effects()
    receiver = WebhookReceiver(app, secrets=[SECRET], store=MemoryStore(), path="/hooks")
    first, second = new_message(payload=b"1"), new_message(payload=b"2")

    with served(receiver) as url:
        async with opened(f"{url}/hooks") as publisher:
            outcomes = [list(await publisher.publish([first, second])) for _ in range(2)]

    assert outcomes == [[Sent(), Sent()]] * 2
    assert app.bodies == [b"1", b"2"]


async def test_relay_sends_what_a_transaction_emitted(url: str, endpoints: Endpoints, sqlite_url: str) -> None:
    """What is taken is gone, what fails waits for the schedule of Standard Webhooks, and what is refused is dead."""
    endpoints.answers["/failing"] = (500, [], b"")
    endpoints.answers["/gone"] = (410, [], b"")
    engine, outbox = create_async_engine(sqlite_url), Outbox()
    await outbox.create_schema(engine)
    async with AsyncSession(engine) as session, session.begin():
        for key in ("well", "failing", "gone"):
            await outbox.emit(
                session, aggregate_type="order", aggregate_id=key, type="OrderPlaced", payload={"of": key}
            )

    async with opened(lambda message: f"{url}/{message.aggregate_id}") as publisher:
        await PollingRelay(engine, publisher, outbox=outbox, lease=31, backoff=standard_webhooks_schedule).drain()
    async with engine.connect() as connection:
        waiting = (await connection.execute(text("SELECT aggregateid, attempts FROM outbox"))).all()
        dead = (await connection.execute(text("SELECT aggregateid, reason FROM outbox_dead"))).all()
    await engine.dispose()

    assert sorted(each.body for each in endpoints.arrived) == [b'{"of":"failing"}', b'{"of":"gone"}', b'{"of":"well"}']
    assert waiting == [("failing", 1)]
    assert dead == [("gone", "HTTP 410: the endpoint wants no more webhooks")]


async def test_own_content_type_and_cloudevents(url: str, endpoints: Endpoints) -> None:
    """The message's own content type is sent, and the attributes of CloudEvents where they are asked for."""
    message = new_message("order-7", headers={"Content-Type": "text/plain"}, created=1767323045.0)

    async with opened(f"{url}/", format="cloudevents", source="/shop") as publisher:
        assert list(await publisher.publish([message])) == [Sent()]

    [arrived] = endpoints.arrived
    assert arrived.headers["content-type"] == "text/plain"
    assert {name: value for name, value in arrived.headers.items() if name.startswith("ce-")} == {
        "ce-specversion": "1.0",
        "ce-id": message.id,
        "ce-source": "/shop",
        "ce-type": "OrderPlaced",
        "ce-subject": "order-7",
        "ce-time": "2026-01-02T03:04:05.000Z",
    }


@pytest.mark.parametrize(
    ("status", "retry_after", "outcome"),
    [
        (200, None, Sent()),
        (202, b"5", Sent()),
        (299, None, Sent()),
        (301, None, RetryLater("HTTP 301")),
        (307, None, RetryLater("HTTP 307")),
        (400, None, RetryLater("HTTP 400")),
        (401, None, RetryLater("HTTP 401")),
        (404, None, RetryLater("HTTP 404")),
        (409, b"1", RetryLater("HTTP 409", after=1)),
        (410, b"5", Refused("HTTP 410: the endpoint wants no more webhooks")),
        (413, None, RetryLater("HTTP 413")),
        (429, b"120", RetryLater("HTTP 429", after=120)),
        (429, b"soon", RetryLater("HTTP 429")),
        (500, None, RetryLater("HTTP 500")),
        (502, b"7", RetryLater("HTTP 502", after=7)),
        (503, b"99999999999999999999", RetryLater("HTTP 503", after=86400)),
        (504, None, RetryLater("HTTP 504")),
    ],
)
async def test_answers(
    url: str, endpoints: Endpoints, status: int, retry_after: bytes | None, outcome: Outcome
) -> None:
    """2xx is sent, 410 is refused, and all else is sent again, when the endpoint says or as the relay does."""
    fields = [(b"location", f"{url}/elsewhere".encode())] if status < 400 else []
    fields += [] if retry_after is None else [(b"retry-after", retry_after)]
    endpoints.answers["/hooks"] = (status, fields, b"")

    assert await outcome_at(f"{url}/hooks") == outcome
    assert [each.path for each in endpoints.arrived] == ["/hooks"]


@pytest.fixture
def far_from_greenwich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a test where local time is not UTC."""
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        (" 30 ", 30),
        ("Fri, 02 Jan 2026 03:05:05 GMT", 60),
        ("Friday, 02-Jan-26 03:05:05 GMT", 60),
        ("Fri Jan  2 03:05:05 2026", 60),
        ("Fri, 02 Jan 2026 03:00:00 GMT", 0),
        ("Fri, 02 Jan 2099 03:00:00 GMT", 86400),
        ("-5", None),
        ("1.5", None),
        ("٣", None),
        ("Fri, 99 Jan 2026 03:05:05 GMT", None),
        ("", None),
    ],
)
def test_retry_after(text: str, seconds: float | None, far_from_greenwich: None) -> None:
    """Seconds, or a date in one of the three forms of RFC 9110; never more than a day."""
    assert read_retry_after(text, now=1767323045) == seconds


_PARTS = ["Fri,", "02", "Jan", "26", "2026", "03:05:05", "24:00:00", "GMT", "-9999", "9" * 20, " ", ",", ":", "(", "é"]


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(st.one_of(st.text(), st.lists(st.sampled_from(_PARTS)).map(" ".join)))
def test_any_retry_after_is_read(text: str) -> None:
    """An endpoint may send anything; it is a time within a day, or nothing."""
    seconds = read_retry_after(text, now=1767323045)

    assert seconds is None or 0 <= seconds <= 86400


@pytest.mark.parametrize("is_async", [False, True])
async def test_endpoint_that_is_gone_is_reported(url: str, endpoints: Endpoints, is_async: bool) -> None:
    """So that the application disables it; a hook that fails changes nothing."""
    gone: list[Endpoint] = []

    def note(endpoint: Endpoint) -> None:
        gone.append(endpoint)
        raise LookupError

    async def note_async(endpoint: Endpoint) -> None:
        note(endpoint)

    endpoints.answers["/gone"] = (410, [], b"")

    outcome = await outcome_at(f"{url}/gone", on_gone=note_async if is_async else note)

    assert isinstance(outcome, Refused)
    assert gone == [Endpoint(f"{url}/gone", [SECRET])]


async def test_function_chooses_the_endpoint(url: str, endpoints: Endpoints) -> None:
    """Sync or async, for each message; nobody, an error, and a URL that is none have their own outcomes."""

    async def endpoint_of(message: Any) -> Endpoint | str | None:
        match message.aggregate_id:
            case "nobody":
                return None
            case "error":
                raise LookupError("the database is away")
            case "malformed":
                return "http://user:password@127.0.0.1/"
            case "own":
                return Endpoint(f"{url}/own", [OTHER])
            case other:
                return f"{url}/{other}"

    batch = [new_message(key) for key in ("nobody", "error", "malformed", "own", "shared")]
    async with opened(endpoint_of) as publisher:
        outcomes = await publisher.publish(batch)

    assert list(outcomes) == [
        Sent(),
        RetryLater("LookupError"),
        Refused("an endpoint has an http or https URL in ASCII, without user, password and fragment"),
        Sent(),
        Sent(),
    ]
    own, shared = sorted(endpoints.arrived, key=lambda each: each.path)
    verify(own.headers, own.body, [OTHER])
    verify(shared.headers, shared.body, [SECRET])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": "a.b"}, "the id of a webhook is"),
        ({"headers": {"Host": "inside"}}, "a header whose name HTTP cannot carry, or reserves"),
        ({"headers": {"Transfer-Encoding": "chunked"}}, "a header whose name HTTP cannot carry, or reserves"),
        ({"headers": {"x": "a\0b"}}, "a header with control characters"),
    ],
)
async def test_what_can_be_no_webhook_is_refused(
    url: str, endpoints: Endpoints, changes: dict[str, Any], reason: str
) -> None:
    """No retry helps it."""
    async with opened(f"{url}/") as publisher:
        [outcome] = await publisher.publish([new_message(**changes)])

    assert isinstance(outcome, Refused)
    assert reason in outcome.reason
    assert endpoints.arrived == []


async def test_headers_of_the_signature_cannot_be_replaced(url: str, endpoints: Endpoints) -> None:
    """A message's own header of such a name does not count."""
    message = new_message(headers={"Webhook-Id": "other", "WEBHOOK-SIGNATURE": "v1,x", "ID": "other"})

    async with opened(f"{url}/") as publisher:
        assert list(await publisher.publish([message])) == [Sent()]

    [arrived] = endpoints.arrived
    assert verify(arrived.headers, arrived.body, [SECRET]).id == arrived.headers["id"] == message.id


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "017700000001", "localhost", "127.1"])
async def test_this_machine_is_refused_by_default(url: str, endpoints: Endpoints, host: str) -> None:
    """Nothing is sent to it, however it is written; no retry helps."""
    outcome = await outcome_at(url.replace("127.0.0.1", host) + "/hooks", allow=())

    assert isinstance(outcome, Refused)
    assert "is not allowed" in outcome.reason
    assert endpoints.arrived == []


async def test_check_of_addresses_can_be_replaced(url: str, endpoints: Endpoints) -> None:
    """A function decides; networks that are allowed are not asked of it."""
    asked: list[str] = []

    def check(address: object) -> bool:
        asked.append(str(address))
        return False

    assert isinstance(await outcome_at(f"{url}/", allow=(), address_check=check), Refused)
    assert await outcome_at(f"{url}/", address_check=check) == Sent()
    assert asked == ["127.0.0.1"]


async def test_name_cannot_change_between_check_and_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is looked up once, and the connection goes to what was checked (DNS rebinding)."""
    looked_up: list[str] = []
    original = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in ("rebinding.example", b"rebinding.example"):
            return original(host, port, *args, **kwargs)
        looked_up.append("rebinding.example")
        return original("127.0.0.2" if len(looked_up) == 1 else "127.0.0.1", port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    inside, outside = Endpoints(), Endpoints()
    port = free_port()
    with served(outside, "127.0.0.2", port), served(inside, "127.0.0.1", port):
        endpoint = f"http://rebinding.example:{port}/"
        outcomes = [await outcome_at(endpoint, allow=["127.0.0.2/32"]) for _ in range(2)]

    assert outcomes == [Sent(), Refused("the address 127.0.0.1 is not allowed")]
    assert len(looked_up) == 2
    assert [each.headers["host"] for each in outside.arrived] == [f"rebinding.example:{port}"]
    assert inside.arrived == []


async def test_next_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch, url: str, endpoints: Endpoints) -> None:
    """One that is away does no harm."""
    original = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in ("two.example", b"two.example"):
            return original(host, port, *args, **kwargs)
        return [each for text in ("127.0.0.3", "127.0.0.1") for each in original(text, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    assert await outcome_at(url.replace("127.0.0.1", "two.example") + "/hooks") == Sent()
    assert isinstance(await outcome_at(f"http://two.example:{free_port()}/"), RetryLater)


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".example", "xn--a", "[v1.x]", "[::zz]"])
async def test_host_that_can_be_none_is_refused(host: str) -> None:
    """No retry helps it, whether an endpoint, the client or the resolver notices."""
    assert isinstance(await outcome_at(lambda message: f"http://{host}/"), Refused)


async def test_name_that_is_not_found_is_retried() -> None:
    """A resolver may be away for a while."""
    assert await outcome_at("http://nowhere.invalid/") == RetryLater("gaierror")


async def test_certificate_is_that_of_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the connection is made to an address, the certificate must be the name's."""
    endpoints, certificate = Endpoints(), self_signed(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with served(endpoints, ssl_certfile=certificate) as url:
        port = urlsplit(url).port
        right = await outcome_at(f"https://127.0.0.1:{port}/")
        wrong = await outcome_at(f"https://localhost:{port}/")

    assert right == Sent()
    assert isinstance(wrong, RetryLater)
    assert len(endpoints.arrived) == 1


async def test_long_answer_is_not_read() -> None:
    """The connection is closed after its beginning."""
    sent = 0

    async def long(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await read(receive)
        gone = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.done() and sent < 1_000_000_000:
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
            sent += 100_000
            await asyncio.sleep(0)  # without a connection, nothing else lets the server notice it
        gone.cancel()

    with served(long) as url:
        assert await outcome_at(url) == Sent()

    assert sent < 100_000_000


async def test_nothing_is_sent_that_belongs_to_somebody_else(
    url: str, endpoints: Endpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither cookies of an earlier answer nor passwords of this machine."""
    endpoints.answers["/hooks"] = (200, [(b"set-cookie", b"a=b")], b"")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    async with opened(f"{url}/hooks") as publisher:
        for _ in range(2):
            assert list(await publisher.publish([new_message()])) == [Sent()]

    names = {name for each in endpoints.arrived for name in each.headers}
    assert not names & {"cookie", "authorization"}


async def test_answer_that_never_ends_is_an_answer() -> None:
    """The status is enough."""

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await read(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await receive()

    with served(endless) as never:
        assert await outcome_at(never, delivery_timeout=6) == Sent()


async def test_slow_endpoint_does_not_stop_the_others(url: str, endpoints: Endpoints) -> None:
    """Messages of other keys are sent meanwhile; those behind it are held, and the batch ends in time."""
    endpoints.hang.add("/slow")
    batch = [new_message("slow"), new_message("slow"), *(new_message(f"fast-{number}") for number in range(20))]

    async with opened(lambda message: f"{url}/{message.aggregate_id}", delivery_timeout=6) as publisher:
        started = time.monotonic()
        outcomes = list(await publisher.publish(batch))
        waited = time.monotonic() - started

    assert outcomes[0] == RetryLater("no answer in 3 s")
    assert isinstance(outcomes[1], RetryLater)
    assert outcomes[1].held
    assert outcomes[2:] == [Sent()] * 20
    assert waited < 6


@pytest.mark.parametrize("retry_after", [None, b"60"])
async def test_endpoint_that_has_too_much_to_do_is_not_asked_again(
    url: str, endpoints: Endpoints, retry_after: bytes | None
) -> None:
    """Messages to it wait without being sent; those to others do not, and no other status has this effect."""
    endpoints.answers["/busy"] = (429, [(b"retry-after", retry_after)] if retry_after else [], b"")
    endpoints.answers["/wrong"] = (400, [(b"retry-after", b"60")], b"")

    async with opened(lambda message: f"{url}/{message.type}") as publisher:
        for kind in ("busy", "busy", "wrong", "wrong", "well"):
            [last] = await publisher.publish([new_message(type=kind)])
            if kind == "busy":
                outcome = last

    assert [each.path for each in endpoints.arrived] == ["/busy", "/wrong", "/wrong", "/well"]
    assert last == Sent()
    assert isinstance(outcome, RetryLater)
    assert not outcome.held
    longest = 60 if retry_after else 5
    assert longest - 2 < (outcome.after or 0) <= longest


async def test_endpoint_that_hangs_is_asked_again_after_a_pause(url: str, endpoints: Endpoints) -> None:
    """It keeps one batch waiting, and not each."""
    endpoints.hang.add("/slow")

    async with opened(f"{url}/slow", delivery_timeout=2) as publisher:
        [hung], [paused] = [await publisher.publish([new_message(str(number))]) for number in range(2)]
        endpoints.hang.clear()
        await asyncio.sleep(paused.after)
        [sent] = await publisher.publish([new_message()])

    assert (hung, sent) == (RetryLater("no answer in 1 s"), Sent())
    assert 0 < paused.after <= 1


def test_pauses() -> None:
    """The longer of two counts, and what is over is forgotten."""
    clock = ManualClock()
    pauses = Pauses(clock)
    pauses.pause("a", 10)
    pauses.pause("a", 5)
    assert (pauses.remaining("a"), pauses.remaining("b")) == (10, 0)

    clock.advance(11)
    assert pauses.remaining("a") == 0
    for number in range(3000):
        pauses.pause(str(number), 1)
        clock.advance(1)
    assert len(pauses._until) <= 1001


async def test_batch_ends_in_time_and_holds_the_rest(url: str, endpoints: Endpoints) -> None:
    """What could not begin in the first half of the time is not tried."""
    endpoints.hang.add("/slow")
    batch = [new_message(f"key-{number}") for number in range(3)]

    async with opened(f"{url}/slow", delivery_timeout=2, concurrency=1) as publisher:
        outcomes = list(await publisher.publish(batch))

    assert outcomes[0] == RetryLater("no answer in 1 s")
    assert outcomes[1:] == [RetryLater("the time of its batch was over", held=True)] * 2
    assert len(endpoints.arrived) == 1


async def test_concurrency_is_bounded(url: str, endpoints: Endpoints) -> None:
    """No more are under way than it says, in several batches together."""
    endpoints.together = 3
    async with opened(f"{url}/", concurrency=3) as publisher:
        batches = [[new_message(f"{batch}-{number}") for number in range(15)] for batch in range(2)]
        await asyncio.gather(*map(publisher.publish, batches))

    assert len(endpoints.arrived) == 30
    assert endpoints.most_at_once == 3


async def test_client_that_is_passed_in_is_used_and_not_closed(url: str, endpoints: Endpoints) -> None:
    """Its own settings count, but it follows no redirect; checks that it does not make are refused."""
    endpoints.answers["/moved"] = (307, [(b"location", b"/other")], b"")
    async with httpx.AsyncClient(headers={"user-agent": "shop"}, follow_redirects=True) as client:
        async with opened(f"{url}/moved", client=client, allow=()) as publisher:
            assert list(await publisher.publish([new_message()])) == [RetryLater("HTTP 307")]
        assert not client.is_closed
        with pytest.raises(ConfigurationError, match="no effect"):
            WebhookPublisher(url, secrets=[SECRET], client=client, allow=LOOPBACK)

    assert [each.headers["user-agent"] for each in endpoints.arrived] == ["shop"]


async def test_publisher_by_url_has_its_secrets_from_the_environment(
    url: str, endpoints: Endpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command line is seen by others."""
    with pytest.raises(ConfigurationError, match=f"^{SECRETS} in the environment"):
        open_publisher(f"{url}/")
    monkeypatch.setenv(SECRETS, f"{OTHER} {SECRET}")

    publisher = open_publisher(f"{url}/?allow=10.0.0.0/8,127.0.0.0/8&concurrency=2&delivery_timeout=20")
    assert publisher.delivery_timeout == 20
    assert list(await publisher.publish([new_message()])) == [Sent()]
    await publisher.aclose()

    [arrived] = endpoints.arrived
    assert len(arrived.headers["webhook-signature"].split()) == 2


@pytest.mark.parametrize(
    ("endpoint", "options"),
    [
        ("nowhere", {}),
        ("https://example.com", {"secrets": []}),
        ("https://example.com", {"delivery_timeout": 0}),
        ("https://example.com", {"concurrency": 0}),
        ("https://example.com", {"allow": ["everywhere"]}),
        ("https://example.com", {"address_check": True}),
        ("https://example.com", {"format": "xml"}),
        ("https://example.com", {"on_gone": "yes"}),
    ],
)
def test_what_cannot_work_is_refused(endpoint: str, options: dict[str, Any]) -> None:
    """When it is made."""
    with pytest.raises(ConfigurationError):
        WebhookPublisher(endpoint, **{"secrets": [SECRET], **options})

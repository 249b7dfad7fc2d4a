"""The sixty rows that follow from draft-ietf-httpapi-idempotency-key-header-07; each test carries its row's number.

Rows without a test, with the reason:

- 13 (a key is never sent with another payload): the client's duty. What follows from breaking it is row 43.
- 15 (keys are random UUIDs): the client's choice. Any key of the published format is taken, row 50.
- 16 (MAY demand time-based keys): not taken up. An application that wants it refuses other keys outside of this layer.
- 25 (follows the published rules): the client's duty. What follows from breaking them is rows 10 and 11.
- 27 (a key with every request, the same with every retry): the client's duty. What a missing one meets is row 40.
- 55 (low-entropy keys can be refused): not taken up. Other callers' keys are out of reach however weak, row 53.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

import pytest
from starlette.middleware.cors import CORSMiddleware

from idempotency import Policy
from idempotency._http.caller import ANONYMOUS
from idempotency._rules import record_id
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.asgi_calls import Effects, Reply, call, protect, respond
from tests.kit.observed_store import ObservedStore
from tests.kit.paths import ROOT

pytestmark = pytest.mark.fronts("asgi", "wsgi")

DOCS = "https://api.example/docs/idempotency"
NOTED = {13, 15, 16, 25, 27, 55}


def test_every_row_is_tested_or_noted():
    """The tests and the rows noted above are the sixty rows, none of them twice."""
    tested = {int(match[1]) for name in globals() if (match := re.match(r"test_row_(\d\d)_", name))}
    noted = {int(row) for row in re.findall(r"^- (\d+) ", __doc__ or "", re.MULTILINE)}
    assert noted == NOTED
    assert tested & noted == set()
    assert tested | noted == set(range(1, 61))


async def _key_of(value: str | bytes, **options: Any) -> str:
    app = Effects()
    await call(protect(app, **options), key=value)
    [operation] = app.operations
    assert operation is not None
    key: str = operation.key
    return key


async def _refused(value: str | bytes, **options: Any) -> Reply:
    app = Effects()
    reply = await call(protect(app, **options), key=value)
    assert app.runs == 0
    assert reply.status == 400
    assert reply.code == "key-invalid"
    return reply


# Syntax, section 2.1


async def test_row_01_the_field_is_a_string_item():
    """The quotes of a String are not part of the key."""
    assert await _key_of('"abc"') == "abc"


async def test_row_02_escapes_are_undone_and_others_invalid():
    r"""Only ``\"`` and ``\\`` are escapes."""
    assert await _key_of(r'"a\"b\\c"') == r'a"b\c'
    for value in (r'"a\nb"', r'"a\u0041"', r'"a\ "', r'"a\"'):
        await _refused(value)


@pytest.mark.parametrize("byte", [*range(0x20), *range(0x7F, 0x100)])
async def test_row_03_only_printable_ascii_inside_a_string(byte):
    """A control or non-ASCII byte makes the key invalid."""
    await _refused(b'"a%cb"' % byte)


@pytest.mark.parametrize("value", ['"abc', '"', '"abc"def', '"abc" def', '"abc""', 'abc"', '"a"b"', '"abc",'])
async def test_row_04_nothing_but_parameters_after_the_closing_quote(value):
    """A missing closing quote, or anything else after it, is invalid."""
    await _refused(value)


async def test_row_05_parameters_are_checked_and_ignored():
    """Parameters do not change the key, and malformed ones make it invalid."""
    app = Effects()
    protected = protect(app)
    await call(protected, key='"abc"')
    for value in ('"abc";v=1', '"abc"; a; b="x";c=?1;d=:aGk=:', '"abc";v=2.5'):
        assert (await call(protected, key=value)).replayed
    assert app.runs == 1
    for value in ('"abc";', '"abc";=1', '"abc";V=1', '"abc";v=', '"abc";v=(1)', '"abc" ;v=1'):
        await _refused(value)


@pytest.mark.parametrize(
    "value", ["abc", "42", "-1.5", "?1", ":aGVsbG8=:", "@1659578233", '%"f%c3%bc"', '("abc")', '("a" "b")']
)
async def test_row_06_other_types_are_invalid_in_strict_mode(value):
    """Strict, only a String is a key."""
    await _refused(value, strict=True)


async def test_row_07_more_than_one_key_is_invalid():
    """Two field lines or a list are never joined, and the first does not win."""
    for value in ('"a", "b"', '"a","a"', "a, b", "a,b"):
        await _refused(value)
    app = Effects()
    for pair in (('"a"', '"a"'), ('"a"', '"b"'), ("a", ""), ("", '"b"')):
        headers = [(b"idempotency-key", each.encode()) for each in pair]
        reply = await call(protect(app), headers=headers)
        assert (reply.status, reply.code) == (400, "key-invalid")
    assert app.runs == 0


async def test_row_08_a_long_string_is_parsed_and_then_judged():
    """1024 characters are read, and refused for their number alone."""
    reply = await _refused('"' + "k" * 1024 + '"')
    assert "1024 characters" in json.loads(reply.body)["detail"]
    assert await _key_of('"' + "k" * 255 + '"') == "k" * 255


async def test_row_09_spaces_and_the_case_of_the_name_do_not_count():
    """Spaces around the value and the case of the field's name make no other key."""
    app = Effects()
    protected = protect(app)
    for name, value in (
        (b"Idempotency-Key", b' "abc"'),
        (b"IDEMPOTENCY-KEY", b'"abc"\t '),
        (b"idempotency-key", b"abc"),
    ):
        await call(protected, headers=[(name, value)])
    assert app.runs == 1


@pytest.mark.parametrize("required", [True, False])
async def test_row_10_an_unparsable_key_is_never_no_key(required):
    """Whether a key is required or not, a malformed one is refused and nothing runs."""
    await _refused('"abc', policy=Policy(required=required))


async def test_row_11_an_empty_key_is_refused():
    """Empty text is a String, and no key."""
    for value in ('""', "", "  ", '"";v=1'):
        await _refused(value)


async def test_row_12_bare_text_is_the_same_key():
    """A value without quotes is taken as opaque text, a UUID that starts with a digit too."""
    uuid = "8e03978e-40d5-43e8-bc93-6894a57f9324"
    app = Effects()
    protected = protect(app)
    first = await call(protected, key=uuid)
    second = await call(protected, key=f'"{uuid}"')
    assert second.replayed
    assert second.body == first.body
    assert app.operations[0].key == uuid


# Uniqueness, section 2.2


async def test_row_14_the_space_of_a_key_is_its_caller():
    """For another caller a key is new; for another operation of the same caller it is taken."""
    app = Effects()
    protected = protect(app, policy=Policy(methods={"POST", "PATCH"}))
    alice, bob = [(b"authorization", b"Bearer alice")], [(b"authorization", b"Bearer bob")]
    assert (await call(protected, key="k", headers=alice)).status == 201
    assert (await call(protected, key="k", headers=bob)).body == b'{"run":2}'
    assert (await call(protected, key="k", headers=alice, path="/refunds")).code == "key-reused"
    assert (await call(protected, key="k", headers=alice, method="PATCH")).code == "key-reused"
    assert (await call(protected, key="k", headers=alice, query=b"dry=1")).code == "key-reused"
    assert app.runs == 2


# Validity and expiry, section 2.3


def _timed(app: Any, **policy: Any) -> tuple[Any, ManualClock]:
    clock = ManualClock()
    return protect(app, MemoryStore(clock=clock), policy=Policy(**policy)), clock


def _documentation() -> str:
    return (ROOT / "docs" / "http.md").read_text()


async def test_row_17_the_expiry_policy_is_published():
    """The period that the documentation names is the one that applies unless told otherwise."""
    assert "A result is replayed for `ttl` (a day) from its completion" in _documentation()
    app = Effects()
    protected, clock = _timed(app)
    await call(protected, key="k")
    clock.advance(24 * 3600 - 1)
    assert (await call(protected, key="k")).replayed
    clock.advance(2)
    assert not (await call(protected, key="k")).replayed


async def test_row_18_a_key_replays_until_it_expires():
    """By the store's clock alone: replayed to the end, new after it."""
    app = Effects()
    protected, clock = _timed(app, ttl=60)
    await call(protected, key="k")
    clock.advance(59.999)
    assert (await call(protected, key="k")).body == b'{"run":1}'
    clock.advance(0.001)
    assert (await call(protected, key="k")).body == b'{"run":2}'


async def test_row_19_the_period_starts_at_completion_and_is_not_extended():
    """The time of the operation does not count, and a replay gains nothing."""

    async def slow(scope, receive, send):
        clock.advance(25)
        await respond(send)

    app = Effects(slow)
    protected, clock = _timed(app, ttl=60, lease=30)
    await call(protected, key="k")
    clock.advance(50)
    assert (await call(protected, key="k")).replayed
    clock.advance(11)
    assert not (await call(protected, key="k")).replayed
    assert app.runs == 2


async def test_row_20_an_expired_record_that_is_still_there_is_absent():
    """It neither replays, nor blocks, nor mismatches."""
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    app = Effects()
    protected = protect(app, store, policy=Policy(ttl=60))
    for number in range(100):
        await call(protected, key=f"k{number}")
    clock.advance(61)
    # A claim drops at most 32 expired records before it looks, oldest first.
    await call(protected, key="k99", body=b"another payload")
    assert await store.purge() == 100 - 1 - 32
    assert app.runs == 101


# Fingerprint, section 2.4


async def test_row_21_the_payload_need_not_be_compared():
    """A constant fingerprint switches the comparison of bodies off, and compared is what remains: the operation."""
    app = Effects()
    protected = protect(app, policy=Policy(fingerprint=lambda request: b""))
    await call(protected, key="k", body=b"one")
    assert (await call(protected, key="k", body=b"two")).replayed
    assert (await call(protected, key="k", body=b"two", path="/other")).status == 422


async def test_row_22_what_is_compared_can_be_chosen():
    """The whole payload, JSON by its meaning, or selected elements."""

    async def amount(request):
        return str((await request.json())["amount"])

    one, spaced, noted, other = b'{"amount":5}', b'{ "amount" : 5 }', b'{"amount":5,"note":"x"}', b'{"amount":6}'
    for fingerprint, equal in (("raw", [one]), ("json", [one, spaced]), (amount, [one, spaced, noted])):
        protected = protect(Effects(), policy=Policy(fingerprint=fingerprint))
        await call(protected, key="k", body=one)
        for body in (one, spaced, noted, other):
            status = (await call(protected, key="k", body=body)).status
            assert status == (201 if body in equal else 422), (fingerprint, body)


async def test_row_23_the_fingerprint_is_of_the_payload_itself():
    """A digest that the client sends neither equals two payloads nor tells one from itself."""
    protected = protect(Effects())
    mine, other = [(b"content-digest", b"sha-256=:bWluZQ==:")], [(b"content-digest", b"sha-256=:b3RoZXI=:")]
    await call(protected, key="k", body=b"one", headers=mine)
    assert (await call(protected, key="k", body=b"two", headers=mine)).status == 422
    assert (await call(protected, key="k", body=b"one", headers=other)).replayed


async def test_row_24_the_same_bytes_are_the_same_request():
    """However they were cut, an empty body included; a multipart boundary alone makes no difference."""
    protected = protect(Effects())
    await call(protected, key="a", body=b"one two")
    assert (await call(protected, key="a", body=(b"one", b"", b" two"))).replayed
    await call(protected, key="b", body=b"")
    assert (await call(protected, key="b", body=(b"", b""))).replayed
    assert (await call(protected, key="b", body=b"\0")).status == 422
    parts = b'--%b\r\nContent-Disposition: form-data; name="n"\r\n\r\n1\r\n--%b--\r\n'
    for boundary, expected in ((b"first", False), (b"second", True)):
        headers = [(b"content-type", b"multipart/form-data; boundary=" + boundary)]
        reply = await call(protected, key="c", body=parts % (boundary, boundary), headers=headers)
        assert reply.replayed is expected


# Responsibilities, section 2.5


async def test_row_26_a_key_where_none_is_supported_is_harmless():
    """A route out of scope does not fail because of a key, not even a malformed one, and does not seem to honour it."""
    app = Effects()
    protected = protect(app, policies={"/login": None})
    for value in ("k", "k", '"broken'):
        reply = await call(protected, path="/login", key=value)
        assert reply.status == 201
        assert not reply.replayed
    assert app.runs == 3


async def _problems(**options: Any) -> dict[str, Reply]:
    """Meet every problem that can be met without a failing store."""
    app = Effects()
    app.gate = asyncio.Event()
    store = MemoryStore(clock=ManualClock())
    policies = {
        "/needed": Policy(required=True),
        "/small": Policy(max_request=1),
        "/held": Policy(outcomes={201: "hold"}),
    }
    protected = protect(app, store, policies={**policies, "/live": Policy(max_response=0)}, **options)
    replies = [
        await call(protected, path="/needed"),
        await call(protected, key='"'),
        await call(protected, key="k", path="/small", body=b"12"),
    ]
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    replies += [await call(protected, key="k"), await call(protected, key="k", body=b"x")]
    app.gate.set()
    await first
    for path in ("/held", "/live"):
        await call(protected, key=path, path=path)
        replies.append(await call(protected, key=path, path=path))
    return {reply.code: reply for reply in replies}


CODES = {
    "key-missing": 400,
    "key-invalid": 400,
    "request-too-large": 413,
    "in-progress": 409,
    "key-reused": 422,
    "outcome-unknown": 409,
    "completed-not-replayable": 409,
}


async def test_row_28_every_problem_links_to_the_published_specification():
    """The document named by ``docs`` is linked from each problem's type and Link field."""
    for code, reply in (await _problems(docs=DOCS)).items():
        assert json.loads(reply.body)["type"] == f"{DOCS}#{code}"
        assert reply.header(b"link") == f'<{DOCS}>; rel="describedby"; type="text/html"'.encode()


async def test_row_29_the_specification_states_the_expiry():
    """The documentation to publish has a chapter on it, with the periods that are the defaults."""
    chapter = _documentation().partition("## How long")[2].partition("\n## ")[0]
    policy = Policy()
    assert (policy.ttl, "`ttl` (a day)" in chapter) == (86400, True)
    assert (policy.lease, "`lease` seconds (30)" in chapter) == (30, True)
    assert "after that the key is new" in chapter.lower()


async def test_row_30_the_life_of_a_key_is_the_resources():
    """A key is claimed, completed, expires, and is purged."""
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app, store, policy=Policy(ttl=60))
    record = record_id(ANONYMOUS, "k")

    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    running = await store.inspect(record)
    app.gate.set()
    await first
    done = await store.inspect(record)
    clock.advance(60)
    assert (running.state.name, done.state.name) == ("RUNNING", "DONE")
    assert await store.purge() == 1
    assert await store.inspect(record) is None


async def test_row_31_the_key_is_read_from_the_field():
    """The field's value is the key of the operation, and of its record."""
    store = MemoryStore()
    await call(protect(Effects(), store), key='"the key"')
    entry = await store.inspect(record_id(ANONYMOUS, "the key"))
    assert entry.key == "the key"


async def test_row_32_the_fingerprint_is_computed_for_each_request():
    """It is part of the claim: 32 bytes, others for another payload."""
    store = ObservedStore()
    protected = protect(Effects(), store)
    for body in (b"one", b"one", b"two"):
        await call(protected, key="k", body=body)
    one, same, two = (claim.fingerprint for claim in store.claims)
    assert len(one) == 32
    assert one == same != two


async def test_row_33_each_request_is_enforced():
    """Every keyed request claims its key before anything runs; the store is asked once for each."""
    store = FaultyStore()
    seen: list[list[str]] = []

    async def look(scope, receive, send):
        seen.append(list(store.calls))
        await respond(send)

    protected = protect(Effects(look), store)
    for key in ("a", "a", "b"):
        await call(protected, key=key)
    assert seen == [["claim"], ["claim", "complete", "claim", "claim"]]
    assert store.calls == ["claim", "complete", "claim", "claim", "complete"]


# Enforcement, section 2.6


async def test_row_34_the_first_response_passes_unchanged():
    """Status, header pairs in order and body are what the application sent, with nothing added."""
    sent = [
        (b"Content-Type", b"text/plain"),
        (b"set-cookie", b"a=1"),
        (b"set-cookie", b"b=2"),
        (b"date", b"Mon, 01 Jan 2024 00:00:00 GMT"),
        (b"connection", b"close"),
    ]

    async def handler(scope, receive, send):
        await respond(send, 202, b"\x00\xff", sent)

    app = Effects(handler)
    reply = await call(protect(app), key="k")
    assert (reply.status, reply.headers, reply.body) == (202, sent, b"\x00\xff")
    assert app.runs == 1


async def test_row_35_a_retry_gets_the_earlier_result():
    """Without another run: the status, the meaningful headers and the body of the first."""
    sent = [(b"content-type", b"text/plain"), (b"location", b"/orders/1"), (b"x-order", b"1"), (b"x-order", b"2")]

    async def handler(scope, receive, send):
        await respond(send, 202, b"\x00\xff", sent)

    app = Effects(handler)
    protected = protect(app)
    await call(protected, key="k")
    reply = await call(protected, key="k")
    assert (reply.status, reply.body) == (202, b"\x00\xff")
    assert reply.headers == [*sent, (b"idempotent-replayed", b"true")]
    assert app.runs == 1


@pytest.mark.parametrize("status", [400, 404, 410, 422])
async def test_row_36_an_earlier_error_is_a_result_too(status):
    """A client error that the application decided is replayed like a success."""
    app = Effects(status=status)
    protected = protect(app)
    await call(protected, key="k")
    reply = await call(protected, key="k")
    assert (reply.status, reply.replayed, app.runs) == (status, True, 1)


async def test_row_37_a_retry_during_processing_conflicts():
    """It is told 409, and the handler does not run."""
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app)
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    retry = await call(protected, key="k")
    app.gate.set()
    await first
    assert (retry.status, retry.code, app.runs) == (409, "in-progress", 1)


@pytest.mark.parametrize("wait", [0, 5])
async def test_row_38_simultaneous_requests_run_once(wait):
    """Of 50, one runs; each other conflicts or is given the replay."""
    app = Effects()
    app.gate = asyncio.Event()
    store = FaultyStore()
    protected = protect(app, store, policy=Policy(wait=wait))
    tasks = [asyncio.create_task(call(protected, key="k")) for _ in range(50)]
    while store.calls.count("claim") < 50:
        await asyncio.sleep(0.001)
    app.gate.set()
    replies = await asyncio.gather(*tasks)
    assert app.runs == 1
    assert sum(reply.status == 201 and not reply.replayed for reply in replies) == 1
    assert sum(reply.replayed if wait else reply.status == 409 for reply in replies) == 49


async def test_row_39_our_own_answers_are_never_the_result():
    """After a conflict and a mismatch the result is the first's."""
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app)
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    assert (await call(protected, key="k")).status == 409
    assert (await call(protected, key="k", body=b"x")).status == 422
    app.gate.set()
    await first
    assert (await call(protected, key="k")).body == b'{"run":1}'


# Errors, section 2.7


async def test_row_40_a_missing_key_is_400():
    """Where a key is required, its absence is refused, with a link in the body."""
    app = Effects()
    reply = await call(protect(app, policy=Policy(required=True), docs=DOCS))
    assert (reply.status, reply.code, app.runs) == (400, "key-missing", 0)
    assert DOCS.encode() in reply.body


async def test_row_41_errors_are_problem_details():
    """Every error is RFC 9457, with type, title, status, detail, and its language."""
    replies = await _problems()
    assert {code: reply.status for code, reply in replies.items()} == CODES
    for reply in replies.values():
        problem = json.loads(reply.body)
        assert problem["status"] == reply.status
        assert problem["title"]
        assert problem["detail"]
        assert problem["type"].startswith("https://")
        assert reply.header(b"content-language") == b"en"
        assert reply.header(b"content-length") == str(len(reply.body)).encode()


async def test_row_42_errors_carry_a_link_field():
    """The same document is linked by a header, for clients that do not read problems."""
    for reply in (await _problems(docs=DOCS)).values():
        assert reply.header(b"link") == f'<{DOCS}>; rel="describedby"; type="text/html"'.encode()


async def test_row_43_another_payload_is_422():
    """One key with two payloads is refused, with a link in the body."""
    app = Effects()
    protected = protect(app, docs=DOCS)
    await call(protected, key="k", body=b"one")
    reply = await call(protected, key="k", body=b"two")
    assert (reply.status, reply.code, app.runs) == (422, "key-reused", 1)
    assert DOCS.encode() in reply.body


async def test_row_44_a_mismatch_changes_nothing():
    """The original payload still replays."""
    protected = protect(Effects())
    await call(protected, key="k", body=b"one")
    await call(protected, key="k", body=b"two")
    assert (await call(protected, key="k", body=b"one")).body == b'{"run":1}'


async def test_row_45_a_running_original_is_409():
    """The problem says what is the matter, and when to come back."""
    reply = (await _problems())["in-progress"]
    problem = json.loads(reply.body)
    assert reply.status == 409
    assert "in progress" in problem["title"]
    assert reply.header(b"retry-after") == b"1"
    assert (problem["retry_after"], problem["lease_left"]) == (1, 30)
    assert problem["retryable"] is True


async def test_row_46_the_unmodified_request_ends_in_the_result():
    """After a 409 nothing is to be corrected."""
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app)
    first = asyncio.create_task(call(protected, key="k", body=b"one"))
    await app.running.wait()
    assert (await call(protected, key="k", body=b"one")).status == 409
    app.gate.set()
    await first
    assert (await call(protected, key="k", body=b"one")).body == b'{"run":1}'


async def test_row_47_an_uncorrected_request_fails_again():
    """400 and 422 are answered alike however often they are asked for."""
    app = Effects()
    protected = protect(app, policies={"/needed": Policy(required=True)})
    await call(protected, key="k")
    for _ in range(3):
        assert (await call(protected, path="/needed")).code == "key-missing"
        assert (await call(protected, key='"broken')).code == "key-invalid"
        assert (await call(protected, key="k", body=b"x")).code == "key-reused"
    assert app.runs == 1


@pytest.mark.parametrize("status", [200, 204, 301, 303, 401, 403, 418, 429, 500, 502, 503])
async def test_row_48_any_other_status_passes_untouched(status):
    """What the application answers is the application's, with or without a key."""
    keyed = await call(protect(Effects(status=status)), key="k")
    bare = await call(protect(Effects(status=status)))
    assert (keyed.status, keyed.headers, keyed.body) == (bare.status, bare.headers, bare.body)
    assert keyed.status == status


async def test_row_49_our_errors_are_told_from_the_applications():
    """The application's own 409 and 422 have no type of ours; ours never seem to be its."""
    for status in (409, 422):
        reply = await call(protect(Effects(status=status)), key="k")
        assert reply.header(b"content-type") == b"application/json"
    types = {json.loads(reply.body)["type"] for reply in (await _problems()).values()}
    assert len(types) == len(CODES)


# Security, section 5


async def test_row_50_the_format_of_a_key_is_fixed():
    """1 to 255 printable ASCII characters, as the documentation says."""
    assert "1 to 255 printable ASCII characters" in _documentation()
    printable = "".join(map(chr, range(0x20, 0x7F)))
    quoted = '"' + printable.replace("\\", "\\\\").replace('"', '\\"') + '"'
    assert await _key_of(quoted) == printable
    assert await _key_of("k") == "k"
    assert await _key_of("k" * 255) == "k" * 255
    await _refused("k" * 256)


async def test_row_51_a_key_is_judged_before_anything_else(caplog):
    """A malformed one reaches neither the store, nor the caller's scope, nor the handler, nor a log."""
    caplog.set_level(logging.DEBUG)
    store, app = FaultyStore(), Effects()
    asked: list[object] = []
    protected = protect(app, store, scope=lambda request: asked.append(request))
    await call(protected, key='"hunter2')
    assert (store.calls, asked, app.runs) == ([], [], 0)
    assert "hunter2" not in caplog.text


async def test_row_52_the_record_is_found_by_caller_and_key():
    """The caller is what the server knows of it, digested: not what the client says of itself."""
    store = ObservedStore()
    protected = protect(Effects(), store, scope=lambda request: request.headers["x-authenticated-as"])
    for name in (b"alice", b"alice", b"bob"):
        await call(protected, key="k", headers=[(b"x-authenticated-as", name)])
    one, same, other = (claim.id for claim in store.claims)
    assert one == same != other
    assert "alice" not in store.claims[0].scope


async def test_row_53_another_callers_key_is_new():
    """Neither a body, nor a 409, nor a 422 tells that somebody else uses it."""
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app)
    alice, bob = [(b"authorization", b"Bearer alice")], [(b"authorization", b"Bearer bob")]
    running = asyncio.create_task(call(protected, key="k", headers=alice, body=b"hers"))
    await app.running.wait()
    app.gate.set()
    during = await call(protected, key="k", headers=bob, body=b"his")
    await running
    after = await call(protected, key="k", headers=[(b"authorization", b"Bearer carol")], body=b"another")
    assert (during.status, after.status) == (201, 201)
    assert during.body != after.body
    assert app.runs == 3


async def test_row_54_a_key_cannot_inject():
    """Delimiters in a key or caller do not imitate another pair, and what is stored under is a digest."""
    store = ObservedStore()
    protected = protect(Effects(), store, scope=lambda request: request.headers["x-caller"])
    pairs = [
        ("a", "b:c"),
        ("a:b", "c"),
        ("a:", "b"),
        ("a", ":b"),
        ("1:a", "1:b"),
        ("x' OR '1'='1", "';DROP--"),
        ("*", "{k}"),
    ]
    for caller, key in pairs:
        assert (await call(protected, key=f'"{key}"', headers=[(b"x-caller", caller.encode())])).status == 201
    ids = {claim.id for claim in store.claims}
    assert len(ids) == len(pairs)
    assert {len(each) for each in ids} == {32}


async def test_row_56_authentication_comes_before_a_replay():
    """Behind authentication, a caller whose rights are revoked gets no replay, and another's credential is no help."""
    protected = protect(Effects())
    revoked: set[bytes] = set()

    async def authenticating(scope, receive, send):
        if dict(scope["headers"])[b"authorization"] in revoked:
            await respond(send, 401)
            return
        await protected(scope, receive, send)

    alice = [(b"authorization", b"Bearer alice")]
    await call(authenticating, key="k", headers=alice)
    assert (await call(authenticating, key="k", headers=alice)).replayed
    revoked.add(b"Bearer alice")
    refused = await call(authenticating, key="k", headers=alice)
    assert (refused.status, refused.body) == (401, b"")


async def test_row_57_stored_responses_are_sensitive():
    """No session is stored, and nothing is kept past its time."""
    clock = ManualClock()
    store = MemoryStore(clock=clock)

    async def handler(scope, receive, send):
        await respond(send, 201, b"secret", [(b"set-cookie", b"session=s3cr3t"), (b"x-kept", b"1")])

    protected = protect(Effects(handler), store, policy=Policy(ttl=60))
    await call(protected, key="k")
    replay = await call(protected, key="k")
    assert replay.headers == [(b"x-kept", b"1"), (b"idempotent-replayed", b"true")]
    clock.advance(60)
    assert await store.purge() == 1


# Scope


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"])
async def test_row_58_other_methods_are_not_touched(method):
    """On them the field is harmless, well-formed or not; POST and PATCH are protected."""
    store, app = FaultyStore(), Effects()
    protected = protect(app, store)
    for value in ("k", "k", '"broken'):
        assert (await call(protected, method=method, key=value)).status == 201
    assert (app.runs, store.calls) == (3, [])
    for protected_method in ("POST", "PATCH"):
        await call(protected, method=protected_method, key=protected_method)
        assert (await call(protected, method=protected_method, key=protected_method)).replayed


async def test_row_59_the_name_of_the_field_is_configuration():
    """It is Idempotency-Key unless another is named; then only that one counts."""
    app = Effects()
    protected = protect(app, header_name="X-Request-Key", policy=Policy(required=True))
    named = [(b"x-request-key", b"k")]
    await call(protected, headers=named)
    assert (await call(protected, headers=named)).replayed
    assert (await call(protected, key="k")).code == "key-missing"
    assert app.runs == 1


async def test_row_60_the_marker_can_be_named_and_exposed():
    """Its name is an option, it is documented, and CORS middleware outside can expose it."""
    assert "Idempotent-Replayed" in _documentation()
    protected = protect(Effects(), replayed_header="X-Replay")
    app = CORSMiddleware(protected, allow_origins=["*"], expose_headers=["X-Replay"])
    origin = [(b"origin", b"https://shop.example")]
    first = await call(app, key="k", headers=origin)
    replay = await call(app, key="k", headers=origin)
    assert first.header(b"x-replay") is None
    assert replay.header(b"x-replay") == b"true"
    assert replay.header(b"access-control-expose-headers") == b"X-Replay"

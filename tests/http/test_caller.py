"""Who is calling: which credentials count, and what happens to those that do not (conformance rows 52-54)."""

from __future__ import annotations

import hashlib
import hmac
import logging

import pytest

from idempotency._http.caller import ANONYMOUS, Credentials, scope_text
from idempotency.errors import ConfigurationError
from idempotency.events import Event
from idempotency.testing import FaultyStore
from tests.kit.asgi_calls import Effects, call, http_scope, protect

pytestmark = pytest.mark.fronts("asgi", "wsgi")

BEARER = (b"authorization", b"Bearer alice")


def caller(*headers: tuple[bytes, bytes], secret: bytes | None = None, scope="credentials", **more) -> str:
    credentials = Credentials(scope, secret, b"idempotency-key", "warn")
    return credentials.caller_of(http_scope(headers=headers, **more))


def test_the_caller_is_the_authorization_header():
    """Rows 52 and 53: another credential is another caller, whatever the field name's case; the text is in no scope."""
    alice = caller(BEARER)

    assert caller((b"host", b"x"), (b"Authorization", b"Bearer alice")) == alice
    assert caller((b"authorization", b"Bearer bob")) != alice
    assert caller(BEARER, (b"authorization", b"Bearer bob")) != alice
    assert alice == "http:1:" + hashlib.sha256(b"authorization:1:12:Bearer alice").hexdigest()


def test_two_authorization_lines_do_not_imitate_one():
    """Row 54: lines are kept apart."""
    two = caller((b"authorization", b"a"), (b"authorization", b"b"))

    assert two != caller((b"authorization", b"ab"))
    assert two != caller((b"authorization", b"a1:b"))
    assert two != caller((b"authorization", b"b"), (b"authorization", b"a"))


def test_a_secret_keys_the_scope():
    """Row 52: with a secret the store does not tell which credential it was."""
    expected = hmac.new(b"s", b"authorization:1:12:Bearer alice", hashlib.sha256).hexdigest()

    assert caller(BEARER, secret=b"s") == "http:1:" + expected
    assert scope_text("alice", b"s") == "http:1:" + hmac.new(b"s", b"scope:1:5:alice", hashlib.sha256).hexdigest()


def test_callers_of_whom_nothing_is_known_share_one_scope():
    """Row 52: no header, None and an empty text are anonymous; an empty header is a credential of its own."""
    assert caller((b"host", b"x"), secret=b"s") == ANONYMOUS == "http:1:anonymous"
    assert scope_text(None, None) == scope_text("", b"s") == scope_text(b"", None) == ANONYMOUS
    assert caller((b"authorization", b"")) != ANONYMOUS


def test_a_named_caller_is_a_digest():
    """Rows 52 and 54: a name does not sit in the store in clear, and imitates neither nobody nor a credential."""
    assert scope_text("alice", None) == "http:1:" + hashlib.sha256(b"scope:1:5:alice").hexdigest()
    assert scope_text("alice", None) == scope_text(b"alice", None)
    assert scope_text(7, None) == scope_text("7", None)
    assert scope_text(0, None) != ANONYMOUS
    assert scope_text("alice", None) != scope_text("Alice", None)
    assert scope_text("anonymous", None) != ANONYMOUS
    assert scope_text("Bearer a", None) != caller((b"authorization", b"Bearer a"))
    assert scope_text("\udcff", None) != ANONYMOUS


@pytest.mark.parametrize("value", [True, 1.5, ["alice"], object()])
def test_a_caller_of_another_type_is_a_mistake(value):
    """A scope that is no name is refused, with its type and not its value in the message."""
    with pytest.raises(ConfigurationError, match=type(value).__name__) as caught:
        scope_text(value, None)

    assert "alice" not in str(caught.value)


COUNTED = [
    *("x-api-key", "api-key", "apikey", "X-ApiKey", "x_api_key", "x-acme-api-key", "x-goog-api-key", "x-rapidapi-key"),
    *("x-auth-token", "x-access-token", "x-api-token", "private-token", "x-shopify-access-token", "x-vault-token"),
    *("ocp-apim-subscription-key", "x-functions-key", "x-access-key", "x-auth-key", "dd-application-key"),
    *("x-tenant-id", "x-tenant", "X-TenantId", "tenant-id", "x-organization-id", "x-organisation", "x-org-id"),
    *("x-account-id", "x-workspace-id", "x-project-id", "x-company-id", "x-merchant-id", "stripe-account"),
    *(
        "openai-organization",
        "openai-project",
        "xero-tenant-id",
        "x-goog-user-project",
        "x-scope-orgid",
        "on-behalf-of",
    ),
    *("x-forwarded-user", "x-forwarded-email", "x-forwarded-preferred-username", "x-auth-request-user", "remote-user"),
    *("x-auth-request-email", "x-remote-user", "x-webauth-user", "x-amzn-oidc-identity", "x-user-id", "x-user"),
    *("x-goog-authenticated-user-id", "x-goog-authenticated-user-email", "cf-access-authenticated-user-email"),
    *("x-ms-client-principal-id", "x-consumer-id", "x-authentik-uid", "tailscale-user-login", "impersonate-user"),
    *("secret-key", "x-secret-key", "x-key", "x-client-key", "x-consumer-key", "x-master-key", "x-partner-key"),
    *("x-acme-tenant-id", "acme-account", "x-account-number", "x-vault-namespace", "x-store-id", "x-shop"),
    *("x-on-behalf-of", "x-impersonate-user", "x-hasura-user-id", "x-actor"),
]


@pytest.mark.parametrize("beside", [(), (BEARER,)])
@pytest.mark.parametrize("name", COUNTED)
def test_two_callers_behind_a_header_do_not_meet(name, beside, caplog):
    """Their values count, alone and beside a credential that both share, and nothing is logged."""
    alice, bob = [caller(*beside, (name.encode(), value)) for value in (b"alice", b"bob")]

    assert len({alice, bob, caller(*beside)}) == 3
    assert caller((name.encode(), b"alice"), *beside) == alice
    assert caller((name.encode(), b"")) == ANONYMOUS
    assert caplog.records == []


def test_the_digest_of_several_credentials_is_stored():
    """Row 54: names and values in the order of the names, each after its length."""
    text = b"credentials:1:13:authorization12:Bearer alice11:x-tenant-id4:acme"

    assert caller((b"X-Tenant-ID", b"acme"), BEARER) == "http:1:" + hashlib.sha256(text).hexdigest()


def test_the_digest_of_an_identity_is_stored():
    """Row 54: the scheme, and the names and values of which the identity consists."""
    identity = b"6:digest8:username5:alice5:realm3:api"
    text = b"credentials:1:16:authorization as%d:%b" % (len(identity), identity)
    header = (b"authorization", b'Digest username="alice", realm="api", nonce="n"')

    assert caller(header) == "http:1:" + hashlib.sha256(text).hexdigest()
    assert caller(header, scope="authorization") == caller(header)
    assert caller((b"authorization", identity)) != caller(header)


@pytest.mark.parametrize(
    "name",
    [
        *("accept", "origin", "user-agent", "x-forwarded-for", "x-request-id", "traceparent", "sec-websocket-key"),
        *("x-csrf-token", "x-xsrf-token", "x-csrftoken", "x-recaptcha-token", "requestverificationtoken", "dpop"),
        *("x-amz-security-token", "x-amz-date", "x-amzn-trace-id", "x-idempotency-token", "x-author", "lock-token"),
        *("surrogate-key", "x-cache-key", "sec-fetch-site", "sec-private-state-token"),
    ],
)
@pytest.mark.parametrize("scope", ["credentials", "authorization"])
def test_other_headers_are_no_credentials(name, scope, caplog):
    """They may differ on every retry: they do not count, and nobody is warned."""
    assert caller((name.encode(), b"1"), scope=scope) == ANONYMOUS
    assert caplog.records == []


UNKNOWN = [
    *("cookie", "signature", "signature-input", "x-forwarded-client-cert", "client-cert", "x-ssl-client-cert"),
    *("cf-access-jwt-assertion", "x-goog-iap-jwt-assertion", "x-amzn-oidc-data", "x-forwarded-access-token"),
    *(
        "x-authorization",
        "proxy-authorization",
        "x-session-id",
        "x-session-token",
        "x-wsse",
        "x-id-token",
        "x-client-id",
    ),
    *("secret", "security-token", "x-acme-key", "x-bearer", "ok-access-passphrase"),
]


@pytest.mark.parametrize("name", UNKNOWN)
async def test_a_credential_that_does_not_count_is_logged_once(name, caplog):
    """The warning names the header and the remedy, and not the value."""
    protected = protect(Effects())
    for key in ("a", "b"):
        assert (await call(protected, key=key, headers=[(name.encode(), b"s3cret")])).status == 201

    [record] = caplog.records
    assert (record.name, record.levelno) == ("idempotency", logging.WARNING)
    assert f" {name}." in record.getMessage()
    assert "scope=" in record.getMessage()
    assert "s3cret" not in record.getMessage()


@pytest.mark.parametrize("name", ["x-api-key", "x-tenant-id", "remote-user", "cookie"])
async def test_the_scope_authorization_warns_of_all_other_credentials(name, caplog):
    """Asked for the Authorization header alone, the library says what it leaves out."""
    protected = protect(Effects(), scope="authorization")
    first, second = [await call(protected, key="k", headers=[(name.encode(), value)]) for value in (b"a", b"b")]

    assert second.body == first.body
    assert [name in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("header", "beside", "warns"),
    [
        ("cookie", "authorization", False),
        ("cookie", "x-api-key", False),
        ("cookie", "remote-user", False),
        ("cookie", "x-tenant-id", True),
        ("cookie", "x-client-key", True),
        ("x-amzn-oidc-data", "x-amzn-oidc-identity", False),
        ("cf-access-jwt-assertion", "cf-access-authenticated-user-email", False),
        ("cf-access-jwt-assertion", "authorization", True),
        ("signature", "authorization", True),
        ("x-forwarded-client-cert", "authorization", True),
    ],
)
async def test_a_credential_is_known_by_another_that_says_as_much(header, beside, warns, caplog):
    """A cookie beside a user's own credential, and the proof beside the name that one proxy sets, need no warning."""
    await call(protect(Effects()), key="k", headers=[(header.encode(), b"1"), (beside.encode(), b"2")])

    assert bool(caplog.records) == warns


@pytest.mark.parametrize("tls", [{"client_cert_chain": ["-----BEGIN"]}, {"client_cert_name": "CN=alice"}])
async def test_a_client_certificate_is_a_credential(tls, caplog):
    """The server has verified who the client is, and the digest does not contain it."""
    await call(protect(Effects()), key="k", extensions={"tls": tls})

    assert "TLS client certificate" in caplog.text


@pytest.mark.parametrize("extensions", [None, {}, {"tls": None}, {"tls": {"client_cert_chain": []}}])
async def test_tls_alone_is_no_credential(extensions, caplog):
    """Only the server has a certificate."""
    await call(protect(Effects()), key="k", extensions=extensions)

    assert caplog.records == []


async def test_an_authorization_that_names_nobody_is_logged(caplog):
    """What Negotiate sends may differ on every retry."""
    await call(protect(Effects()), key="k", headers=[(b"authorization", b"Negotiate s3cret")])

    [record] = caplog.records
    assert "Authorization" in record.getMessage()
    assert "s3cret" not in record.getMessage()


async def test_warnings_are_bounded(caplog):
    """Clients choose the names of headers."""
    protected = protect(Effects())
    await call(protected, key="k", headers=[(b"x-token-%d" % number, b"1") for number in range(150)])

    assert len(caplog.records) == 100


@pytest.mark.parametrize(
    "headers",
    [
        [(b"cookie", b"s=s3cret")],
        [(b"x-forwarded-client-cert", b"Hash=s3cret"), BEARER],
        [(b"authorization", b"Negotiate s3cret")],
    ],
)
async def test_unknown_credentials_can_be_refused(headers):
    """Nothing is claimed and nothing runs; the answer names the header, and not its value."""
    events: list[Event] = []
    store, app = FaultyStore(), Effects()
    protected = protect(app, store, unknown_credentials="refuse", on_event=events.append)
    reply = await call(protected, key="k", headers=headers)

    assert (reply.status, reply.code, app.runs, store.calls) == (500, "caller-unknown", 0, [])
    assert headers[0][0] in reply.body.lower()
    assert b"s3cret" not in reply.body
    assert [(event.kind, event.error) for event in events] == [("refused", "CallerUnknownError")]
    assert (await call(protected, key="k", headers=[BEARER])).status == 201
    assert (await call(protected, headers=headers)).status == 201


@pytest.mark.parametrize("scope", [None, lambda request: "alice"])
async def test_the_users_own_scope_needs_no_warning(scope, caplog):
    """Who names the callers, or opts out, has decided what counts."""
    protected = protect(Effects(), scope=scope, unknown_credentials="refuse")

    assert (await call(protected, key="k", headers=[(b"cookie", b"1"), (b"signature", b"2")])).status == 201
    assert caplog.records == []


async def test_the_header_with_the_key_is_no_credential(caplog):
    """Also where its name looks like one."""
    protected = protect(Effects(), header_name="X-Access-Token")
    for key in (b"a", b"b"):
        await call(protected, headers=[(b"x-access-token", key)])

    assert caplog.records == []


async def test_hosts_are_one_key_space_unless_named():
    """A caller of two hosts meets its own key again; with a scope that names the host it does not."""

    def caller_on_host(request):
        return f"{request.headers['host']} {request.headers['authorization']}"

    for scope, runs in (("credentials", 1), (caller_on_host, 2)):
        app = Effects()
        protected = protect(app, scope=scope)
        for host in (b"a.example", b"b.example"):
            await call(protected, key="k", headers=[(b"host", host), BEARER])

        assert app.runs == runs

"""Who a value of the Authorization header names, where each try has another value."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from typing import Any

import botocore.auth
import httpx
import pytest
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from idempotency import IdempotencyMiddleware, Policy
from idempotency._http.authorization import UNREADABLE, WHOLE, read_identity

DIGEST = (
    'Digest username="alice", realm="api", nonce="n1", uri="/a?x=1,2", qop=auth, nc=00000001, cnonce="c1", '
    'response="11111111111111111111111111111111", opaque="o, p"'
)
AWS = (
    "AWS4-HMAC-SHA256 Credential=AKALICE/20260101/eu-north-1/execute-api/aws4_request, "
    "SignedHeaders=host;x-amz-date, Signature=11aa"
)
OAUTH = (
    'OAuth realm="", oauth_consumer_key="alice", oauth_token="t%2B1", oauth_signature_method="HMAC-SHA1",'
    'oauth_timestamp="1", oauth_nonce="n1", oauth_signature="a%2Bb%3D"'
)
AKAMAI = "EG1-HMAC-SHA256 client_token=alice;access_token=a1;timestamp=20260101T00:00:00+0000;nonce=n1;signature=s1="

# One value, what its retry has in place of a part of it, and what another caller has in place of "alice".
SCHEMES = {
    "digest": (DIGEST, {"n1": "n2", "c1": "c2", "00000001": "00000002", "1" * 32: "2" * 32, "o, p": "q"}, "bob"),
    "digest, not quoted": ("DIGEST  username=alice,realm=api,nonce=n1,response=r1", {"n1": "n2", "r1": "r2"}, "bob"),
    "digest, extended": ('Digest realm="api", username*=UTF-8\'\'alice, nonce="n1"', {"n1": "n2"}, "bob"),
    "digest, hashed": ('Digest username="alice", userhash=true, realm="api", nonce="n1"', {"n1": "n2"}, "bob"),
    "digest, of Windows": ('Digest username="CORP\\alice", realm="api", nonce="n1"', {"n1": "n2"}, "bob"),
    "digest, quotes": ('Digest username="\\"alice\\"", realm="api", nonce="n1"', {"n1": "n2"}, "bob"),
    "SigV4": (AWS.replace("AKALICE", "alice"), {"20260101": "20260102", "11aa": "22bb"}, "bob"),
    "SigV4, compact": (AWS.replace("AKALICE", "alice").replace(", ", ","), {"20260101": "20260102"}, "bob"),
    "SigV4A": (
        "AWS4-ECDSA-P256-SHA256 Credential=alice/20260101/s3/aws4_request, SignedHeaders=host, Signature=30",
        {"20260101": "20260102", "Signature=30": "Signature=31"},
        "bob",
    ),
    "SigV2": ("AWS alice:frJIUN8DYpKDtOLCwo//yllqDzg=", {"frJIUN8D": "lZfZ4tBx"}, "bob"),
    "GOOG4": (
        "GOOG4-RSA-SHA256 Credential=alice@a.iam.gserviceaccount.com/20260101/auto/storage/goog4_request,"
        "SignedHeaders=host,Signature=s1",
        {"20260101": "20260102", "s1": "s2"},
        "bob",
    ),
    "OSS4": ("OSS4-HMAC-SHA256 Credential=alice/20260101/cn/oss/aliyun_v4_request,Signature=s1", {"s1": "s2"}, "bob"),
    "OSS": ("OSS alice:s1=", {"s1": "s2"}, "bob"),
    "TC3": (
        "TC3-HMAC-SHA256 Credential=alice/2026-01-01/cvm/tc3_request, SignedHeaders=host, Signature=s1",
        {"2026-01-01": "2026-01-02", "s1": "s2"},
        "bob",
    ),
    "ACS3": ("ACS3-HMAC-SHA256 Credential=alice,SignedHeaders=host;x-acs-date,Signature=s1", {"s1": "s2"}, "bob"),
    "Huawei": ("SDK-HMAC-SHA256 Access=alice, SignedHeaders=host, Signature=s1", {"s1": "s2"}, "bob"),
    "Azure": ("HMAC-SHA256 Credential=alice&SignedHeaders=host;x-ms-date&Signature=s1=", {"s1": "s2"}, "bob"),
    "SAS": ("SharedAccessSignature sr=alice&sig=s1%3D&se=1&skn=send", {"s1": "s2", "se=1": "se=2"}, "bob"),
    "SharedKey": ("SharedKey alice:s1=", {"s1": "s2"}, "bob"),
    "SharedKeyLite": ("SharedKeyLite alice:s1=", {"s1": "s2"}, "bob"),
    "OAuth 1.0": (OAUTH, {"n1": "n2", '"1"': '"2"', "a%2Bb": "b%2Ba"}, "bob"),
    "Hawk": ('Hawk id="alice", ts="1", nonce="n1", ext="a, b", mac="m1="', {"n1": "n2", "m1": "m2"}, "bob"),
    "HTTP Signature": (
        'Signature keyId="alice",algorithm="hs2019",headers="date",signature="s1="',
        {"s1": "s2"},
        "bob",
    ),
    "EdgeGrid": (AKAMAI, {"n1": "n2", "s1": "s2"}, "bob"),
    "MAC": ('MAC id="alice", ts="1", nonce="n1", mac="m1="', {"n1": "n2", "m1": "m2"}, "bob"),
    "Veracode": ("VERACODE-HMAC-SHA-256 id=alice,ts=1,nonce=n1,sig=s1", {"n1": "n2", "s1": "s2"}, "bob"),
    "Kong": ('hmac username="alice", algorithm="hmac-sha256", headers="date", signature="s1="', {"s1": "s2"}, "bob"),
    "pair": ("APIAuth-HMAC-SHA256 alice:s1=", {"s1": "s2"}, "bob"),
    "Alibaba": ("acs alice:s1=", {"s1": "s2"}, "bob"),
    "VAPID": ("vapid t=eyJ.t1.x, k=alice", {"t1": "t2"}, "bob"),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_retry_names_its_caller_again(name):
    """The proof of a credential differs on every try; the name in it does not, and is another for another caller."""
    value, changes, other = SCHEMES[name]
    retry = value
    for before, after in changes.items():
        assert before in retry
        retry = retry.replace(before, after)

    first = read_identity(value.encode())

    assert first.text is not None
    assert first.stable
    assert read_identity(retry.encode()) == first
    stranger = read_identity(value.replace("alice", other).encode())
    assert stranger.stable
    assert stranger != first


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (DIGEST, ('realm="api"', 'realm="admin"')),
        (AWS, ("execute-api", "s3")),
        (OAUTH, ("t%2B1", "t%2B2")),
        (OAUTH, ('realm=""', 'realm="4711"')),
        (AKAMAI, ("access_token=a1", "access_token=a2")),
        ('Digest username="a", realm="r"', ('realm="r"', 'userhash=true, realm="r"')),
        ('Hawk id="a", app="x", mac="m"', ('app="x"', 'app="y"')),
        ("AWS a:s", ("AWS", "OSS")),
    ],
)
def test_each_part_of_an_identity_counts(value, change):
    """A name is one within its realm, its service, its application and its scheme."""
    assert read_identity(value.encode()) != read_identity(value.replace(*change).encode())


@pytest.mark.parametrize("value", ["Bearer abc", "bearer abc", "Basic YTpi", "DPoP abc", "Token abc", "abc", "", " "])
def test_a_credential_without_a_proof_counts_whole(value):
    """It is the same on every try."""
    assert read_identity(value.encode()) == WHOLE


@pytest.mark.parametrize(
    "value",
    [
        "Negotiate YIIJvwYGKwYBBQUCoIIJszCC",
        "negotiate",
        "NTLM TlRMTVNTUAADAAAA",
        "SCRAM-SHA-256 data=biwsbj11c2Vy",
        "HOBA result=abc",
        'WSSE profile="UsernameToken"',
        "HMAC-SHA256 SignedHeaders=host&Signature=s1",
        "Acme key=k1, nonce=n1",
        "type%3Dmaster%26ver%3D1.0%26sig%3Dabc",
        # Two readers may find two names in these.
        'Digest username="alice", username="mallory", realm="api"',
        'Digest username="alice", UserName="mallory", realm="api"',
        'Digest username="alice" username="mallory", realm="api"',
        'Digest username="alice, realm="api"',
        'Digest username="alice", realm="api", nonce',
        'Digest username="alice", realm="api"; nonce="n1"',
        'Digest realm="api", nonce="n1"',
        'Digest username="", realm="api"',
        'Digest username="alice"',
        "AWS4-HMAC-SHA256 Credential=a/20260101/x, Credential=b/20260101/x, Signature=s",
        "AWS4-HMAC-SHA256 SignedHeaders=host, Signature=s",
        "AWS alice",
        "AWS alice:s1, mallory:s2",
        "OSS2 AccessKeyId:alice,Signature:s1",
        "SharedKey :s1",
        "bce-auth-v1/alice/2026-01-01T00:00:00Z/1800/host/s1",
        pytest.param("Digest username=alice,realm=api,opaque=" + "o" * 9000, id="long"),
    ],
)
def test_a_proof_without_a_readable_name_counts_whole(value):
    """It names nobody that a retry would name too, and says so."""
    assert read_identity(value.encode()) == UNREADABLE


_PARTS = st.sampled_from(
    [*'",;&=:/ \t\\*\n', 'username="', "username=", "realm=", "Credential=", "id=", "a/20260101/b", "%26sig%3D"]
)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([value.split()[0] for value, *_ in SCHEMES.values()]),
    st.lists(_PARTS | st.text(st.characters(max_codepoint=255), max_size=6)).map("".join),
)
def test_any_value_is_read(scheme, text):
    """No value raises, and one that names nobody is not taken for one that does."""
    identity = read_identity(f"{scheme} {text}".encode("latin-1"))

    assert identity.text is None or scheme.lower().encode() in identity.text


PASSWORDS = {"alice": "wonder", "bob": "builder"}


class DigestAuthentication:
    """Let in who proves a password by RFC 7616; each challenge has a nonce of its own, which is good for one request.

    ``proofs`` receives the values that were accepted.
    """

    def __init__(self, app: Any, proofs: list[str]) -> None:
        self.app = app
        self.proofs = proofs
        self.nonces = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not self.accepts(dict(scope["headers"]).get(b"authorization", b"").decode()):
            self.nonces += 1
            challenge = f'Digest realm="api", nonce="n{self.nonces}", qop="auth", algorithm=SHA-256'
            await Response("", 401, {"WWW-Authenticate": challenge})(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def accepts(self, value: str) -> bool:
        given = dict(re.findall(r'(\w+)="?([^",]+)', value))
        if given.get("nonce") != f"n{self.nonces}":
            return False
        secret = sha(f"{given['username']}:api:{PASSWORDS[given['username']]}")
        request = sha(f"POST:{given['uri']}")
        if given["response"] != sha(f"{secret}:{given['nonce']}:{given['nc']}:{given['cnonce']}:auth:{request}"):
            return False
        self.proofs.append(value)
        return True


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def orders_api(*outside: Middleware) -> httpx.AsyncClient:
    """Return a client of an API whose orders have numbers."""
    orders: list[int] = []

    async def order(request: Any) -> Response:
        orders.append(len(orders) + 1)
        return JSONResponse({"order": orders[-1]}, 201)

    inside = Middleware(IdempotencyMiddleware, store="memory://", policy=Policy(required=True))
    app = Starlette(routes=[Route("/orders", order, methods=["POST"])], middleware=[*outside, inside])
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://api", headers={"idempotency-key": "k"}
    )


async def test_retries_with_digest_meet_the_first_request():
    """A client of httpx that signs again, or begins again, gets its own order, and another user does not."""
    proofs: list[str] = []
    alice = httpx.DigestAuth("alice", "wonder")
    async with orders_api(Middleware(DigestAuthentication, proofs=proofs)) as client:
        tries = [
            await client.post("/orders", auth=auth)
            for auth in (alice, alice, httpx.DigestAuth("alice", "wonder"), httpx.DigestAuth("bob", "builder"))
        ]

    assert [(each.status_code, each.json()["order"]) for each in tries] == [(201, 1), (201, 1), (201, 1), (201, 2)]
    assert len(set(proofs)) == 4


@pytest.mark.parametrize("signer", ["SigV4", "SigV2"])
async def test_retries_that_aws_signs_again_meet_the_first_request(signer, monkeypatch):
    """Signed by botocore a day later, a retry gets its own order, and another access key does not."""
    now = datetime(2026, 1, 1, 23, 59, 59, tzinfo=UTC)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: now)
    monkeypatch.setattr(botocore.auth, "formatdate", lambda **_: now.isoformat())

    def signed(access_key: str) -> dict[str, str]:
        credentials = Credentials(access_key, "secret")
        request = AWSRequest("POST", "http://api/orders", headers={"host": "api"})
        if signer == "SigV4":
            botocore.auth.SigV4Auth(credentials, "execute-api", "eu-north-1").add_auth(request)
        else:
            botocore.auth.HmacV1Auth(credentials).add_auth(request)
        return dict(request.headers.items())

    async with orders_api() as client:
        first = signed("AKALICE")
        answers = [await client.post("/orders", headers=first)]
        now = datetime(2026, 1, 2, 0, 0, 1, tzinfo=UTC)
        retry = signed("AKALICE")
        answers += [await client.post("/orders", headers=headers) for headers in (retry, signed("AKBOB"))]

    assert first["Authorization"] != retry["Authorization"]
    assert [(each.status_code, each.json()["order"]) for each in answers] == [(201, 1), (201, 1), (201, 2)]

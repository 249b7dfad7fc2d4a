"""Signatures of Standard Webhooks: golden vectors, rotation, time, and everything that is not a signature."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idempotency.errors import ConfigurationError, WebhookMalformedError, WebhookUnverifiedError
from idempotency.webhooks import Webhook, sign, verify

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
PRIVATE = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
PUBLIC = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="

NOW = 1614265330
BODY = b'{"test": 2432232314}'
HEADERS = {
    "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "webhook-timestamp": "1614265330",
    "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
}
SIGNED_WITH_ED25519 = "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg=="


def test_vector_of_the_specification() -> None:
    """The example of the reference libraries is signed and verified."""
    assert sign("msg_p5jXN8AQM9LWM0D4loKWxJek", BODY, [SECRET], timestamp=NOW + 0.9) == HEADERS
    assert verify(HEADERS, BODY, [SECRET], now=NOW) == Webhook("msg_p5jXN8AQM9LWM0D4loKWxJek", NOW)


@pytest.mark.parametrize("private", [PRIVATE, PRIVATE[:47] + "c="], ids=["with its public key", "seed only"])
def test_vector_of_ed25519(private: str) -> None:
    """The example of Svix, the first implementation, is signed and verified."""
    headers = sign("msg_p5jXN8AQM9LWM0D4loKWxJek", BODY, [private], timestamp=NOW)

    assert headers["webhook-signature"] == SIGNED_WITH_ED25519
    assert verify(headers, BODY, [PUBLIC], now=NOW).id == "msg_p5jXN8AQM9LWM0D4loKWxJek"
    with pytest.raises(WebhookUnverifiedError):
        verify(headers, BODY + b" ", [PUBLIC], now=NOW)


def test_vector_of_the_library_standardwebhooks() -> None:
    """What standardwebhooks 1.1.0 makes of text that is not ASCII, with a secret of 64 bytes without its padding."""
    secret = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vMDEyMzQ1Njc4OTo7PD0+Pw"
    headers = sign("msg_1", '{"city":"Zürich"}'.encode(), [secret], timestamp=1767323045)

    assert headers["webhook-signature"] == "v1,XLh98bD0Zlkp36d1uaVv0WCm1sSGyGx7JmpJ3iAkv+k="


def test_body_is_bytes() -> None:
    """A body that is no text is verified as it is."""
    body = bytes(range(256))

    assert verify(sign("msg_1", body, [SECRET]), body, [SECRET]).id == "msg_1"


def test_secrets_are_rotated_without_a_gap() -> None:
    """While a sender signs with the old and the new secret, receivers with either verify; one with neither does not."""
    both = sign("msg_1", BODY, [OTHER, SECRET, PRIVATE], timestamp=NOW)

    assert len(both["webhook-signature"].split(" ")) == 3
    for known in ([OTHER], [SECRET], [PUBLIC], ["whsec_" + "A" * 32, SECRET]):
        assert verify(both, BODY, known, now=NOW).timestamp == NOW
    with pytest.raises(WebhookUnverifiedError):
        verify(both, BODY, ["whsec_" + "A" * 32], now=NOW)


def test_headers_are_a_mapping_or_pairs_in_any_case() -> None:
    """What frameworks and servers give is read."""
    raw = [(name.title().encode(), value.encode()) for name, value in HEADERS.items()]

    assert verify(raw, BODY, [SECRET], now=NOW) == verify(HEADERS, BODY, [SECRET], now=NOW)


@pytest.mark.parametrize("part", ["body", *HEADERS])
def test_no_byte_can_be_changed(part: str) -> None:
    """Whatever byte is another one, the webhook is refused."""
    original = BODY if part == "body" else HEADERS[part].encode()
    for place in range(len(original)):
        for flipped in (1, 2, 32):
            changed = bytearray(original)
            changed[place] ^= flipped
            headers = HEADERS if part == "body" else {**HEADERS, part: changed.decode("latin-1")}
            with pytest.raises(WebhookUnverifiedError):
                verify(headers, bytes(changed) if part == "body" else BODY, [SECRET], now=NOW)


@pytest.mark.parametrize(("now", "near"), [(-301, False), (-300, True), (0, True), (300, True), (301, False)])
def test_timestamp_is_near(now: int, near: bool) -> None:
    """A webhook that somebody sends again later is refused, and one from a clock that is ahead."""
    if near:
        verify(HEADERS, BODY, [SECRET], now=NOW + now)
    else:
        with pytest.raises(WebhookUnverifiedError, match="more than 300 seconds"):
            verify(HEADERS, BODY, [SECRET], now=NOW + now)
        verify(HEADERS, BODY, [SECRET], now=NOW + now, tolerance=301)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("webhook-id", None),
        ("webhook-id", ""),
        ("webhook-id", "msg.1"),
        ("webhook-id", "msg 1"),
        ("webhook-id", 'msg"1'),
        ("webhook-id", "x" * 256),
        ("webhook-id", "é"),
        ("webhook-timestamp", None),
        ("webhook-timestamp", "1614265330.0"),
        ("webhook-timestamp", "+1614265330"),
        ("webhook-timestamp", "nan"),
        ("webhook-timestamp", "١٦١٤"),
        ("webhook-timestamp", "9" * 13),
        ("webhook-signature", None),
        ("webhook-signature", " "),
        ("webhook-signature", "v1,x " * 21),
    ],
)
def test_malformed_headers_are_400(name: str, value: str | None) -> None:
    """They are refused before anything is computed, also with a signature that would be right."""
    headers = {each: text for each, text in {**HEADERS, name: value}.items() if text is not None}

    with pytest.raises(WebhookMalformedError, match=name) as caught:
        verify(headers, BODY, [SECRET], now=NOW)

    assert caught.value.status == 400


@settings(derandomize=True, database=None, deadline=None, max_examples=150)
@given(st.dictionaries(st.sampled_from(sorted(HEADERS)), st.text() | st.sampled_from(sorted(HEADERS.values()))))
def test_any_header_is_answered(changes: dict[str, str]) -> None:
    """Whatever somebody sends is verified or refused, and nothing else happens."""
    headers = {**HEADERS, **changes}

    if headers == HEADERS:
        verify(headers, BODY, [SECRET, PUBLIC], now=NOW)
    else:
        with pytest.raises(WebhookUnverifiedError):
            verify(headers, BODY, [SECRET, PUBLIC], now=NOW)


def test_header_that_is_sent_twice_is_400() -> None:
    """Two readers could choose different ones."""
    pairs = [*HEADERS.items(), ("Webhook-Id", "other")]

    with pytest.raises(WebhookMalformedError, match="more than once"):
        verify(pairs, BODY, [SECRET], now=NOW)


@pytest.mark.parametrize("signature", ["v1", "v1,", ",", "v2,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=", "v1a,%%"])
def test_what_is_no_signature_of_a_known_version_is_401(signature: str) -> None:
    """It counts as none, also beside a good one."""
    with pytest.raises(WebhookUnverifiedError) as caught:
        verify({**HEADERS, "webhook-signature": signature}, BODY, [SECRET, PUBLIC], now=NOW)

    assert caught.value.status == 401
    both = f"{signature} {HEADERS['webhook-signature']}"
    verify({**HEADERS, "webhook-signature": both}, BODY, [SECRET, PUBLIC], now=NOW)


def test_id_cannot_swallow_the_timestamp() -> None:
    """Signed text that is divided at other full stops is another webhook, and refused."""
    headers = sign("msg", b"1614265331.{}", [SECRET], timestamp=NOW)
    divided = {**headers, "webhook-id": f"msg.{NOW}", "webhook-timestamp": "1614265331"}

    with pytest.raises(WebhookMalformedError):
        verify(divided, b"{}", [SECRET], now=NOW)


@pytest.mark.parametrize("webhook_id", ["", "a.b", "a b", "a,b", "é", "x" * 256])
def test_id_that_no_receiver_takes_is_not_sent(webhook_id: str) -> None:
    """A sender refuses it first."""
    with pytest.raises(ValueError, match="visible ASCII"):
        sign(webhook_id, BODY, [SECRET])


@pytest.mark.parametrize(
    "secrets",
    [
        [],
        SECRET,
        [None],
        ["MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
        ["whsec_" + base64.b64encode(b"x" * 23).decode()],
        ["whsec_" + base64.b64encode(b"x" * 65).decode()],
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLa%%"],
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwé"],
        ["whsk_" + "A" * 84 + "AA=="],
        ["whsk_AAAA"],
        ["whpk_AAAA"],
    ],
)
def test_secret_that_cannot_be_used_is_named_without_itself(secrets: list[str]) -> None:
    """The error says what is wrong, and nothing of the secret."""
    for use in (lambda: sign("msg_1", BODY, secrets), lambda: verify(HEADERS, BODY, secrets, now=NOW)):
        with pytest.raises(ConfigurationError) as caught:
            use()
        assert "MfKQ" not in str(caught.value)


def test_each_side_has_its_own_part_of_a_key() -> None:
    """A public key signs nothing, and a private key is not for receivers."""
    with pytest.raises(ConfigurationError, match="receiver's part"):
        sign("msg_1", BODY, [PUBLIC])
    with pytest.raises(ConfigurationError, match="sender's part"):
        verify(HEADERS, BODY, [PRIVATE], now=NOW)

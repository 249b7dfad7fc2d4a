"""Read who a value of the Authorization header names, where the value is a new one on every try."""

from __future__ import annotations

import re
from dataclasses import dataclass

from idempotency._http.digest import join


@dataclass(frozen=True, slots=True)
class Identity:
    """What of a value names its caller on every retry. None: the value as a whole.

    Without ``stable`` the value may differ on every retry, and who sent it cannot be read.
    """

    text: bytes | None = None
    stable: bool = True


WHOLE = Identity()
UNREADABLE = Identity(stable=False)


@dataclass(frozen=True, slots=True)
class _Fields:
    """An identity in named fields: the first list of names that are all there, and those of ``also`` that are there."""

    required: tuple[tuple[bytes, ...], ...]
    also: tuple[bytes, ...] = ()
    separator: bytes = b","


_SIGNED = _Fields(
    ((b"credential",), (b"access",), (b"awsaccesskeyid",), (b"keyid",), (b"id",), (b"username",), (b"accesskey",))
)

# By the scheme in lower case.
_SCHEMES: dict[bytes, Identity | _Fields] = {
    b"bearer": WHOLE,  # RFC 6750
    b"basic": WHOLE,  # RFC 7617
    b"dpop": WHOLE,  # RFC 9449: the token. Its proof is in a header of its own
    b"digest": _Fields(  # RFC 7616 section 3.4
        ((b"username", b"realm"), (b"username*", b"realm")), (b"username*", b"userhash")
    ),
    b"mutual": _Fields(((b"user", b"realm"),)),  # RFC 8120 section 3.1
    b"oauth": _Fields(((b"oauth_consumer_key",),), (b"oauth_token", b"realm")),  # RFC 5849 section 3.5.1
    b"vapid": _Fields(((b"k",),)),  # RFC 8292 section 3
    b"concealed": _Fields(((b"k",),)),  # RFC 9729 section 4
    b"hawk": _Fields(((b"id",),), (b"app", b"dlg")),
    b"mac": _Fields(((b"id",),)),  # draft-ietf-oauth-v2-http-mac
    b"signature": _Fields(((b"keyid",),)),  # draft-cavage-http-signatures
    b"eg1-hmac-sha256": _Fields(((b"client_token", b"access_token"),), separator=b";"),  # Akamai
    b"sharedaccesssignature": _Fields(((b"sr",),), (b"skn",), separator=b"&"),  # Azure
    # <account>:<signature>
    **dict.fromkeys((b"sharedkey", b"sharedkeylite", b"goog1", b"oss", b"obs", b"qiniu", b"qbox"), _SIGNED),
    **dict.fromkeys((b"amx", b"apiauth", b"acs", b"mws", b"nos", b"qingstor", b"upyun", b"kss"), _SIGNED),
    **dict.fromkeys((b"negotiate", b"ntlm", b"kerberos", b"scram-sha-1", b"scram-sha-256", b"hoba"), UNREADABLE),
    **dict.fromkeys((b"gssapi", b"privatetoken", b"wsse", b"nostr"), UNREADABLE),
}

# AWS4-HMAC-SHA256, AWS4-ECDSA-P256-SHA256, AWS, GOOG4-RSA-SHA256, TC3-HMAC-SHA256, OSS4-HMAC-SHA256, and their like.
_SIGNED_SCHEME = re.compile(rb"aws.*|bce-auth-v.*|.*(?:hmac|ecdsa|ed25519|-rsa|sign).*")
_SIGNED_TEXT = re.compile(
    rb"(?:\A|[\s,;&-]|%26)(?:c?nonce|sig|signature|mac|timestamp|ts|response)(?:[ \t]*+[=:]|%3D)", re.IGNORECASE
)

# RFC 9110 section 11.2, but an unquoted value may have any character that ends nothing, as those of AWS do.
_NAME = rb"[ \t]*+([!#$%&'*+.^_`|~0-9A-Za-z-]++)[ \t]*+=[ \t]*+"
_FIELD = {
    b",": re.compile(rb'[ \t,]*+%b(?:"((?:[^"\\]|\\.)*+)"|([^\s",]*+))[ \t]*+(?:,[ \t,]*+|\Z)' % _NAME, re.DOTALL),
    b";": re.compile(rb'%b(?:"([^"\\]*+)"|([^\s";]*+))[ \t]*+(?:;[ \t;]*+|\Z)' % _NAME),
    b"&": re.compile(rb'%b(?:"([^"\\]*+)"|([^\s"&]*+))[ \t]*+(?:&|\Z)' % _NAME),
}
_MAX_LENGTH = 8192
"""Bytes of a value that are parsed; a longer one counts whole."""

_PAIR = re.compile(rb"([^\s:,=]++):[^\s,]++")
_DATE = re.compile(rb"/(?:[0-9]{8}|[0-9]{4}-[0-9]{2}-[0-9]{2})(?=/|\Z)")


def read_identity(value: bytes) -> Identity:
    """Read the identity in a value of the Authorization header; it never raises.

    An identity is a name, and no proof that the caller is who it names: it is for callers who are authenticated. What
    cannot be parsed strictly is not read, so that no other parser finds another name in it.
    """
    if value[:7].lower() == b"bearer ":
        return WHOLE  # as for the scheme in the table, but sooner: most requests have it
    words = value.split(None, 1)
    if not words:
        return WHOLE
    scheme, text = words[0].lower(), words[1] if len(words) == 2 else b""
    rule = _SCHEMES.get(scheme)
    if isinstance(rule, Identity):
        return rule
    if rule is None:
        if not _SIGNED_SCHEME.fullmatch(scheme):
            return UNREADABLE if _SIGNED_TEXT.search(value, 0, _MAX_LENGTH) else WHOLE
        rule = _SIGNED
    return _read(scheme, text.strip(), rule)


def _read(scheme: bytes, text: bytes, rule: _Fields) -> Identity:
    fields = _fields(text, b"&" if rule is _SIGNED and b"&" in text and b"," not in text else rule.separator)
    if fields is None:
        pair = _PAIR.fullmatch(text) if rule is _SIGNED else None
        return UNREADABLE if pair is None else Identity(join((scheme, pair[1])))
    for names in rule.required:
        if fields.get(names[0]) and all(name in fields for name in names):
            also = (name for name in rule.also if name in fields and name not in names)
            return Identity(join([scheme, *(part for name in (*names, *also) for part in (name, fields[name]))]))
    return UNREADABLE


def _fields(text: bytes, separator: bytes) -> dict[bytes, bytes] | None:
    r"""Parse ``name=value`` fields; return None for any other text, for a long one, and if a name occurs twice.

    Escapes in a quoted value stay: clients on Windows send ``DOMAIN\user`` without one.
    """
    if len(text) > _MAX_LENGTH:
        return None
    fields: dict[bytes, bytes] = {}
    position = 0
    while position < len(text):
        field = _FIELD[separator].match(text, position)
        if field is None or (name := field[1].lower()) in fields:
            return None
        value = field[3] if field[2] is None else field[2]
        # The date of a credential is the day of the signature.
        fields[name] = _DATE.sub(b"", value, count=1) if name == b"credential" else value
        position = field.end()
    return fields

"""Which headers carry credentials, by their names.

Names are compared without their case, ``-`` and ``_``: ``X-API-Key``, ``X-ApiKey`` and ``x_api_key`` are one name here.
``docs/http.md`` ("Whose key") lists them for users.
"""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal[
    "",  # not about the caller
    "authorization",
    "key",  # an API key, or a token that is sent in a header of its own
    "tenant",  # a tenant or an account: it divides callers, and names none
    "identity",  # a name that a proxy sets after it has authenticated the caller
    "proof",  # what a proxy sends beside such a name, and renews
    "cookie",
    "unknown",  # looks like a credential, and what it says of the caller is not known
]

_NAME = re.compile(rb"[a-z0-9_.-]{1,64}")

_KEY = re.compile(
    rb".*(?:api|auth|access|app|application|license|secret|subscription|functions)key(?:id)?"
    rb"|.*(?:access|api|auth|private|vault)token"
)
_TENANT = re.compile(
    rb".*(?:tenant|organi[sz]ation|account|workspace|company|merchant|customer|namespace)"
    rb"(?:id|uuid|key|name|slug|code|number|sid|domain)?"
    rb"|x?(?:org|team|project|partner|shop|store|vendor|seller|site)(?:id|uuid|key|name|slug|code)?"
    rb"|(?:openai|anthropic|xgoog|xms|xscope|chatgpt)(?:org|project|userproject)(?:id)?"
    # A key of such a kind is often one for all users of an application.
    rb"|x?(?:client|consumer|developer|integration|master|private|public|service|user)?key(?:id)?"
    rb"|.*user(?:id|uuid|sub)|x(?:login|actor|actas|sub|subject)(?:id)?"
    rb"|stripecontext|x?onbehalfof|x?impersonateuser|xshopifyshopdomain"
)
_IDENTITY = re.compile(
    rb"x?(?:forwarded|remote|auth|authrequest|authenticated|webauth|vouch|proxy|original)?"
    rb"(?:user|userid|username|preferredusername|useremail|email)"
    rb"|xamznoidcidentity|xgoogauthenticateduser(?:id|email)|cfaccessauthenticateduseremail"
    rb"|xmsclientprincipal(?:id|name)|xconsumer(?:id|username|customid)|xcredentialidentifier"
    rb"|xauthentik(?:uid|username)|xpomeriumclaim(?:sub|user|email)|tailscaleuserlogin"
)
_PROOF = re.compile(
    rb"x(?:forwarded|authrequest|amznoidc)(?:accesstoken|data)|xgoogiapjwtassertion|cfaccessjwtassertion"
    rb"|x(?:pomerium|authentik)jwt(?:assertion)?|xmsclientprincipal|xmstoken.*|x(?:endpointapi|apigatewayapi)?userinfo"
)
_NONE = re.compile(
    rb".*(?:csrf|xsrf|captcha|turnstile|verificationtoken|appcheck|author|authors|authority)"
    rb"|.*(?:csrf|xsrf|captcha|turnstile)token|xamz[^n].*|(?:sync|lock|continuation|page|next|push)token"
    rb"|.*(?:idempotency|dedup|request|transaction)(?:key|token)|wwwauthenticate"
    rb"|.*(?:cache|surrogate|partition|routing|shard|sort|encryption|correlation|message)key"
)
_UNKNOWN = re.compile(
    rb".*(?:auth|token|secret|passw|credential|session|jwt|assertion|clientcert|sslclient|clientdn|macaroon|wsse"
    rb"|clientid|identity|principal|apikey|bearer|passphrase).*"
    rb"|.*key(?:id)?|signature|signatureinput"
)
# The first that matches decides.
_KINDS: tuple[tuple[Kind, re.Pattern[bytes]], ...] = (
    ("authorization", re.compile(rb"authorization")),
    ("cookie", re.compile(rb"cookie")),
    ("", _NONE),
    ("proof", _PROOF),
    ("identity", _IDENTITY),
    ("tenant", _TENANT),
    ("key", _KEY),
    ("unknown", _UNKNOWN),
)


def _kind(name: bytes) -> Kind:
    name = name.lower()
    # Browsers send names with "sec-" by themselves (Fetch standard, section 2.2.2).
    if not _NAME.fullmatch(name) or name.startswith(b"sec-"):
        return ""
    squeezed = name.translate(None, b"-_")
    for kind, pattern in _KINDS:
        if pattern.fullmatch(squeezed):
            return kind
    return ""


class _Kinds(dict[bytes, Kind]):
    """The kinds of the names seen so far. Clients choose names, so the number and the length of them are bounded."""

    def __missing__(self, name: bytes) -> Kind:
        kind = _kind(name)
        if len(self) < 1024 and len(name) <= 64:
            self[name] = kind
        return kind


KINDS = _Kinds()
"""The kind of a header, by its name as it was sent: ``KINDS[name]``."""

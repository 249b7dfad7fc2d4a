"""Which policy a request is given (conformance rows 26 and 58)."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idempotency._http.routes import Routes
from idempotency.errors import ConfigurationError
from idempotency.policy import Policy

DEFAULT = Policy()
A = Policy(ttl=1)
B = Policy(ttl=2)
C = Policy(ttl=3)


@pytest.mark.parametrize(
    ("method", "expected"),
    [("POST", DEFAULT), ("PATCH", DEFAULT), ("GET", None), ("PUT", None), ("DELETE", None), ("OPTIONS", None)],
)
def test_the_default_policy_protects_its_methods_everywhere(method, expected):
    """Row 58: without routes the policy's methods decide."""
    assert Routes(DEFAULT, {}).policy_for(method, "/orders") is expected


def test_a_policy_may_protect_other_methods():
    """Row 58: the methods are the policy's to choose."""
    routes = Routes(Policy(methods={"put"}), {"/a": Policy(methods={"DELETE"})})

    assert routes.policy_for("PUT", "/x") is not None
    assert routes.policy_for("POST", "/x") is None
    assert routes.policy_for("DELETE", "/a") is not None
    assert routes.policy_for("PUT", "/a") is None
    assert routes.policy_for("DELETE", "/x") is None


def test_a_route_with_a_method_protects_exactly_that_method():
    """The key's method counts, not the methods of its policy; other methods go on to the next key or the default."""
    routes = Routes(DEFAULT, {"PUT /a": A, "/a/{x}": B, "delete /a/{x}": C})

    assert routes.policy_for("PUT", "/a") is A
    assert routes.policy_for("POST", "/a") is DEFAULT
    assert routes.policy_for("PUT", "/b") is None
    assert routes.policy_for("DELETE", "/a/1") is C
    assert routes.policy_for("POST", "/a/1") is B
    assert routes.policy_for("PUT", "/a/1") is None


def test_a_method_before_none_on_the_same_path():
    """On one path the key with a method decides, in whatever order they are given."""
    for policies in ({"POST /a": A, "/a": B}, {"/a": B, "POST /a": A}):
        routes = Routes(DEFAULT, policies)
        assert routes.policy_for("POST", "/a") is A
        assert routes.policy_for("PATCH", "/a") is B


def test_none_takes_a_route_out_of_scope():
    """Row 26: a key sent there does no harm, since nobody looks at it."""
    routes = Routes(DEFAULT, {"/a": None, "POST /b": None, "/c/{x:path}": None, "POST /c/d": A, "/c/e": B})

    assert routes.policy_for("POST", "/a") is None
    assert routes.policy_for("PATCH", "/a") is None
    assert routes.policy_for("POST", "/b") is None
    assert routes.policy_for("PATCH", "/b") is DEFAULT
    assert routes.policy_for("POST", "/c/x/y") is None
    assert routes.policy_for("POST", "/c/d") is A
    assert routes.policy_for("PATCH", "/c/d") is None
    assert routes.policy_for("PATCH", "/c/e") is B


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a/1", A),
        ("/a/x y", A),
        ("/a/x\ny", A),
        ("/a/{id}", A),
        ("/a", DEFAULT),
        ("/a/", DEFAULT),
        ("/a/1/", DEFAULT),
        ("/a/1/2", DEFAULT),
        ("/A/1", DEFAULT),
        ("/x/a/1", DEFAULT),
        ("a/1", DEFAULT),
        ("", DEFAULT),
    ],
)
def test_a_parameter_is_one_segment(path, expected):
    """``{name}`` is one segment that is not empty; a trailing slash makes another path."""
    assert Routes(DEFAULT, {"/a/{id}": A}).policy_for("POST", path) is expected


@pytest.mark.parametrize(
    ("path", "expected"), [("/f/1", A), ("/f/1/2/", A), ("/f/", A), ("/f/x\ny", A), ("/f", DEFAULT), ("/g/1", DEFAULT)]
)
def test_a_path_parameter_is_the_rest(path, expected):
    """``{name:path}`` is all that follows, which may be empty."""
    assert Routes(DEFAULT, {"/f/{rest:path}": A}).policy_for("POST", path) is expected


def test_a_slash_at_the_end_makes_another_path():
    """Literal paths are compared as they are, the root included."""
    routes = Routes(DEFAULT, {"/a": A, "/a/": B, "/": C, "/a.b": A, "/b/": None})

    assert routes.policy_for("POST", "/a") is A
    assert routes.policy_for("POST", "/a/") is B
    assert routes.policy_for("POST", "/") is C
    assert routes.policy_for("POST", "/axb") is DEFAULT
    assert routes.policy_for("POST", "/b") is DEFAULT


def test_dots_and_other_characters_are_literal_beside_parameters():
    """A route is no regular expression."""
    routes = Routes(DEFAULT, {"/v1.0/(x)+/{id}": A})

    assert routes.policy_for("POST", "/v1.0/(x)+/7") is A
    assert routes.policy_for("POST", "/v1x0/x/7") is DEFAULT


@pytest.mark.parametrize("turn", [1, -1])
def test_the_more_specific_path_decides(turn):
    """Literal before parameter before rest, from the left, in whatever order the keys are given."""
    policies = {"/{all:path}": A, "/a/{x}": B, "/a/me": C, "/{y}/b": Policy(ttl=4), "/a/{x}/{rest:path}": Policy(ttl=5)}
    routes = Routes(DEFAULT, dict(list(policies.items())[::turn]))

    asked = ["/a/me", "/a/you", "/a/b", "/z/b", "/z/z", "/a/b/c/d", "/"]
    found = [routes.policy_for("POST", path) for path in asked]
    assert [policy.ttl for policy in found if policy is not None] == [3, 2, 2, 4, 1, 5, 1]


@pytest.mark.parametrize(
    "key",
    [
        "",
        " ",
        "a",
        "a/b",
        "POST",
        "POST ",
        "POST a",
        "POST  /a",
        " /a",
        "/a ",
        "/a b",
        "POST\t/a",
        "PO-ST /a",
        "POST,PUT /a",
        "/a?b=c",
        "/a#b",
        "/a/{}",
        "/a/{x",
        "/a/x}",
        "/a/{x}y",
        "/a/y{x}",
        "/a/{x}{y}",
        "/a/{1x}",
        "/a/{x:int}",
        "/a/{x:path}/b",
        "/a/{x:}",
        "/a/{{x}}",
        None,
        b"/a",
        ("POST", "/a"),
    ],
)
def test_a_malformed_key_is_refused_at_construction(key):
    """A mistake in a route is an error when the application starts, with the key in the message."""
    with pytest.raises(ConfigurationError) as caught:
        Routes(DEFAULT, {key: A})

    assert repr(key) in str(caught.value)


@pytest.mark.parametrize(
    "twins", [("/a/{x}", "/a/{y}"), ("POST /a", "post /a"), ("PUT /{x:path}", "PUT /{y:path}"), ("/{x}/b", "/{_}/b")]
)
def test_two_keys_for_the_same_requests_are_refused(twins):
    """One of the two would never be used."""
    with pytest.raises(ConfigurationError, match="same paths"):
        Routes(DEFAULT, dict.fromkeys(twins, A))


@pytest.mark.parametrize("policies", [["x"], [("/a", A)], "/a", {"/a"}, 1])
def test_policies_that_are_no_mapping_are_refused(policies):
    """As any wrong option, with a ConfigurationError."""
    with pytest.raises(ConfigurationError, match="a mapping of routes to policies"):
        Routes(DEFAULT, policies)


@pytest.mark.parametrize("value", [False, "POST", {"ttl": 1}, Policy])
def test_what_is_no_policy_is_refused(value):
    """Only a Policy, or None, is a value."""
    with pytest.raises(ConfigurationError, match="must be a Policy or None"):
        Routes(DEFAULT, {"/a": value})


def test_a_callable_fingerprint_anywhere_is_known():
    """The middleware asks beforehand whether it needs request objects."""
    called = Policy(fingerprint=lambda request: b"")

    assert not Routes(DEFAULT, {"/a": A, "/b": None}).callable_fingerprints
    assert Routes(called, {}).callable_fingerprints
    assert Routes(DEFAULT, {"/a/{x}": called}).callable_fingerprints


MANY = {f"/r{number}/{{x}}/s/{{y}}": A for number in range(200)}


@settings(max_examples=200, deadline=None)
@given(st.text("/ar1s{}\n\x00é", max_size=30))
def test_any_path_has_an_answer(path):
    """No path raises."""
    assert Routes(DEFAULT, {"/a/{x}/s": A, "/r1/{y:path}": None}).policy_for("POST", path) in (DEFAULT, A, None)


def test_a_long_path_is_matched_in_linear_time():
    """A megabyte of path costs milliseconds of processor time, also where many patterns nearly match."""
    routes = Routes(DEFAULT, {**MANY, "/{a}/{b}/{c}/{d:path}": B})
    started = time.process_time()

    assert routes.policy_for("POST", "/" + "a" * 1_000_000) is DEFAULT
    assert routes.policy_for("POST", "/a" * 500_000) is B
    assert routes.policy_for("POST", "/r199/1/s/2") is A
    assert time.process_time() - started < 2

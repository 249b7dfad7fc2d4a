"""What a policy accepts, and what it decides."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import pytest

from idempotency import Policy
from idempotency.errors import ConfigurationError
from idempotency.policy import Outcome


class NearError(ValueError):
    """An exception nearer than ValueError."""


def test_defaults() -> None:
    """The defaults are those of the documentation."""
    policy = Policy()

    assert (policy.ttl, policy.lease, policy.wait) == (86400.0, 30.0, 0.0)
    assert (policy.required, policy.methods) == (False, frozenset({"POST", "PATCH"}))
    assert (policy.on_crash, policy.on_store_error, policy.fingerprint) == ("rerun", "fail_closed", "raw")
    assert (policy.max_request, policy.max_response) == (1073741824, 1048576)
    assert dict(policy.outcomes) == {}
    assert (policy.mismatch_status, policy.in_progress_status, policy.key_per_path) == (422, 409, False)


@pytest.mark.parametrize("name", ["ttl", "lease", "wait"])
@pytest.mark.parametrize(
    ("value", "seconds"),
    [(3, 3.0), (0.25, 0.25), (timedelta(days=1, milliseconds=1), 86400.001), (timedelta(minutes=2), 120.0)],
)
def test_durations(name: str, value: float | timedelta, seconds: float) -> None:
    """A duration is given in seconds or as a timedelta, and read in float seconds, without being rounded."""
    read = getattr(Policy(**{name: value}), name)

    assert read == seconds
    assert type(read) is float


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ttl": 0}, "0.0"),
        ({"ttl": -1}, "-1.0"),
        ({"ttl": timedelta(0)}, "0.0"),
        ({"lease": 0}, "0.0"),
        ({"lease": timedelta(seconds=-5)}, "-5.0"),
        ({"wait": -0.5}, "-0.5"),
        ({"ttl": float("inf")}, "ttl must be seconds or a timedelta, not inf"),
        ({"lease": float("nan")}, "lease must be seconds or a timedelta, not nan"),
        ({"ttl": "60"}, "ttl must be seconds or a timedelta, not '60'"),
        ({"wait": None}, "wait must be seconds or a timedelta, not None"),
        ({"lease": True}, "lease must be seconds or a timedelta, not True"),
        ({"mismatch_status": 399}, "mismatch_status must be a status from 400 to 599, not 399"),
        ({"mismatch_status": 200}, "not 200"),
        ({"mismatch_status": True}, "not True"),
        ({"in_progress_status": 600}, "in_progress_status must be a status from 400 to 599, not 600"),
        ({"in_progress_status": "409"}, "not '409'"),
        ({"in_progress_status": 409.0}, "not 409.0"),
        ({"key_per_path": 1}, "key_per_path must be True or False, not 1"),
        ({"max_request": -1}, "-1"),
        ({"max_response": -2}, "-2"),
        ({"methods": "POST"}, "methods must be a set of names, not 'POST'"),
        ({"methods": None}, "methods must be a set of names, not None"),
        ({"methods": {7}}, r"methods must be a set of names, not \{7\}"),
        ({"outcomes": None}, "outcomes must be a mapping, not None"),
        ({"outcomes": [404]}, r"outcomes must be a mapping, not \[404\]"),
        ({"on_crash": "retry"}, "on_crash must be one of rerun, hold, not 'retry'"),
        ({"on_store_error": "open"}, "on_store_error must be one of fail_closed, fail_open, not 'open'"),
        ({"fingerprint": "yaml"}, "fingerprint must be one of raw, json, not 'yaml'"),
        ({"outcomes": {404: "keep"}}, r"outcomes\[404\] must be one of store, release, hold, not 'keep'"),
        ({"outcomes": {99: "store"}}, "not 99"),
        ({"outcomes": {600: "store"}}, "not 600"),
        ({"outcomes": {True: "store"}}, "not True"),
        ({"outcomes": {"404": "store"}}, "not '404'"),
        ({"outcomes": {"6xx": "store"}}, "not '6xx'"),
        ({"outcomes": {"xxx": "store"}}, "not 'xxx'"),
        ({"outcomes": {int: "store"}}, "not <class 'int'>"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    """A wrong value fails where the policy is made, with the value in the message."""
    with pytest.raises(ConfigurationError, match=message):
        Policy(**options)


def test_zero_sizes_are_allowed() -> None:
    """No body at all may be kept, or sent."""
    policy = Policy(max_request=0, max_response=0)

    assert (policy.max_request, policy.max_response) == (0, 0)


def test_methods_are_upper_case() -> None:
    """Methods are compared as HTTP writes them."""
    assert Policy(methods={"put", "Post"}).methods == frozenset({"PUT", "POST"})


def test_immutable() -> None:
    """A policy that routes share cannot be changed, nor through the mapping it was made from."""
    rules: dict[Any, Any] = {404: "release"}
    policy = Policy(outcomes=rules)
    rules[404] = "hold"

    assert policy.outcome_of_status(404) == "release"
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.required = True  # type: ignore[misc]
    with pytest.raises(TypeError):
        policy.outcomes[404] = "hold"  # type: ignore[index]


@pytest.mark.parametrize("name", ["ttl", "lease", "wait"])
def test_durations_are_immutable(name: str) -> None:
    """Neither can its durations."""
    policy = Policy()

    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, name, 1.0)
    assert getattr(policy, name) == getattr(Policy(), name)


def test_replace_keeps_the_rest() -> None:
    """A policy is varied by dataclasses.replace, and checked again."""
    policy = dataclasses.replace(Policy(ttl=60, outcomes={404: "release"}), lease=timedelta(seconds=5))

    assert (policy.ttl, policy.lease, policy.outcome_of_status(404)) == (60.0, 5.0, "release")
    with pytest.raises(ConfigurationError):
        dataclasses.replace(policy, lease=0)


@pytest.mark.parametrize(
    "status", [200, 201, 204, 301, 303, 400, 404, 405, 406, 410, 413, 414, 415, 416, 418, 422, 451]
)
def test_final_answers_are_stored(status: int) -> None:
    """An answer that will not change is kept."""
    assert Policy().outcome_of_status(status) == "store"


@pytest.mark.parametrize(
    "status",
    [
        *(307, 308, 421),
        *(401, 402, 403, 407),
        *(408, 409, 423, 424, 425, 429),
        *(411, 412, 417, 426, 428, 431),
        *(500, 501, 502, 503, 504, 507, 511, 599),
    ],
)
def test_answers_after_which_the_same_request_is_sent_again_release(status: int) -> None:
    """Elsewhere, with other credentials or after a payment, later, or with other header fields; and after a failure."""
    assert Policy().outcome_of_status(status) == "release"


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(404, "hold"), (400, "release"), (429, "release"), (500, "hold"), (503, "store"), (200, "store")],
)
def test_status_rules(status: int, outcome: str) -> None:
    """An exact status wins over its class, its class over the default for one status, both over the defaults."""
    policy = Policy(outcomes={404: "hold", "4xx": "release", "5xx": "hold", 503: "store"})

    assert policy.outcome_of_status(status) == outcome


def test_class_wins_over_a_transient_default() -> None:
    """A rule for a class covers the transient statuses in it."""
    assert Policy(outcomes={"4xx": "store"}).outcome_of_status(429) == "store"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (NearError(), "hold"),
        (ValueError(), "store"),
        (UnicodeError(), "store"),
        (KeyError(), "release"),
        (TimeoutError(), "release"),
    ],
)
def test_nearer_exception_class_wins(error: Exception, outcome: str) -> None:
    """A rule for the nearer class wins; an exception without a rule releases."""
    policy = Policy(outcomes={ValueError: "store", NearError: "hold"})

    assert policy.outcome_of_exception(error) == outcome


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), GeneratorExit()])
def test_exits_follow_on_crash(error: BaseException) -> None:
    """What is no Exception stopped the operation anywhere, as a crash does."""
    assert Policy().outcome_of_exception(error) == "release"
    assert Policy(on_crash="hold").outcome_of_exception(error) == "hold"
    assert Policy(on_crash="hold", outcomes={BaseException: "release"}).outcome_of_exception(error) == "release"


def test_exceptions_release_also_where_crashes_hold() -> None:
    """A handler that raised has ended: its key is free."""
    assert Policy(on_crash="hold").outcome_of_exception(ValueError()) == "release"


def choose(status: int, headers: Mapping[str, str], body: bytes | None) -> Outcome | None:
    """Choose no outcome."""


FULL: dict[str, Any] = {
    "ttl": timedelta(hours=1),
    "lease": 5,
    "methods": {"PUT", "post"},
    "outcomes": {404: "release", "5xx": "hold", NearError: "store"},
    "outcome": choose,
    "fingerprint": "json",
}
AS_FULL: dict[str, Any] = {
    **FULL,
    "ttl": 3600,
    "methods": ["POST", "PUT"],
    "outcomes": {NearError: "store", "5xx": "hold", 404: "release"},
}


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy)), dataclasses.replace],
    ids=["copy", "deepcopy", "pickle", "replace"],
)
@pytest.mark.parametrize("options", [{}, FULL])
def test_a_copy_is_equal_and_immutable(copied: Callable[[Policy], Policy], options: dict[str, Any]) -> None:
    """A policy is copied with its rules, for another process too."""
    policy = Policy(**options)
    copy_of_policy = copied(policy)

    assert copy_of_policy == policy
    assert hash(copy_of_policy) == hash(policy)
    assert (copy_of_policy.ttl, dict(copy_of_policy.outcomes)) == (policy.ttl, options.get("outcomes", {}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        copy_of_policy.ttl = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        copy_of_policy.outcomes[404] = "hold"  # type: ignore[index]


def test_equal_policies_are_one_member_of_a_set() -> None:
    """Neither the order of rules nor the way in which a duration is written makes another policy."""
    assert {Policy(**FULL), Policy(**AS_FULL), Policy()} == {Policy(), Policy(**FULL)}
    assert Policy(**FULL) != Policy(**{**FULL, "outcomes": {404: "release"}})


def test_a_policy_is_shown_with_its_rules() -> None:
    """Its text, and its fields as a dictionary, contain the rules."""
    policy = Policy(outcomes={404: "hold"})

    assert "outcomes={404: 'hold'}" in repr(policy)
    assert dataclasses.asdict(policy)["outcomes"] == {404: "hold"}


def test_positional_arguments_are_refused() -> None:
    """Options have names."""
    with pytest.raises(TypeError):
        Policy(60)  # type: ignore[misc]

"""What the clients of Stripe make of the answers of an API with ``Profile.stripe``."""

from __future__ import annotations

import pytest

from tests.clients.rig import Call, Got, require, run_clients
from tests.kit.asgi_servers import Bench, Live
from tests.kit.targets import Target

pytestmark = [pytest.mark.alone, pytest.mark.processes]

SERVER = "uvicorn-httptools"
CLIENTS = ("stripe", "stripe for Node")
IN_VAIN = ("completed", "unknown", "unreadable")
EACH_CLIENT = pytest.mark.parametrize("client", CLIENTS)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[Call, Got]:
    """What each client got."""
    bench = Bench(tmp_path_factory.mktemp("profile"), Target("memory", "memory://"))
    with Live(SERVER, 1, bench, "tests.clients.application:app", profile="stripe") as live:
        return run_clients({SERVER: live}, {SERVER: ("running", "reused", *IN_VAIN)}, CLIENTS)


@EACH_CLIENT
def test_a_reused_key_is_an_idempotency_error_of_stripe(client: str, answers: dict[Call, Got]) -> None:
    """Each client raises its own error for a key that was used for another request, and does not try again."""
    require(client)
    got = answers[Call(SERVER, client, "reused")]

    assert got.error == {"stripe": "IdempotencyError", "stripe for Node": "StripeIdempotencyError"}[client]
    assert got.statuses == [201, 400]


@EACH_CLIENT
@pytest.mark.parametrize("situation", IN_VAIN)
def test_an_answer_in_vain_is_an_error_of_stripe(situation: str, client: str, answers: dict[Call, Got]) -> None:
    """Each client raises its error for an answer that gives no result, after the one retry that met it."""
    require(client)
    got = answers[Call(SERVER, client, situation)]

    assert got.error == {"stripe": "APIError", "stripe for Node": "StripeAPIError"}[client]
    assert got.requests == 2


@EACH_CLIENT
def test_a_client_of_stripe_has_the_result_of_a_key_in_use(client: str, answers: dict[Call, Got]) -> None:
    """Each client tries again while its first request runs, and has its result."""
    require(client)
    got = answers[Call(SERVER, client, "running")]

    assert 409 in got.statuses
    assert [got.id] == got.effects

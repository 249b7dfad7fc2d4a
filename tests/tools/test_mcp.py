"""Idempotent tools over MCP: the SDK's own client and server."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from idempotency.errors import ConfigurationError
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore, crash_everywhere
from idempotency.tool import idempotent_tool
from tests.kit.asgi_servers import until
from tests.kit.ledger import Ledger
from tests.kit.servers import missing

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

if find_spec("mcp") is None:
    missing("the SDK of MCP is not installed")

import httpx2
from mcp.client.client import Client
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.shared.exceptions import MCPError
from mcp_types import CallToolResult, ElicitResult, TextContent, ToolAnnotations
from pydantic import AnyHttpUrl, BaseModel

from idempotency.adapters.mcp import KEY, REPLAYED_AT, IdempotentTools
from tests.tools.mcp_shop import WORDS, Shop, VerifiedOverMcp, over_http, text_of

REFUND = {"order_id": "7", "amount": 5}
CHARGE = {"order_id": "7"}
MODES = ["2026-07-28", "legacy"]


class Refunded(BaseModel):
    """What a tool returns, as its module names it."""

    refunded: int


@pytest.fixture
def shop() -> Shop:
    return Shop(MemoryStore())


def meta(key: Any) -> Any:
    return {KEY: key}


# Which calls are one.


@pytest.mark.parametrize("mode", MODES)
async def test_a_call_with_the_same_key_is_a_replay(shop: Shop, mode: Any) -> None:
    """It says so, to the model and to the client; the structured result is the same."""
    async with Client(shop.server, mode=mode) as client:
        first = await client.call_tool("charge", CHARGE, meta=meta("k-1"))
        again = await client.call_tool("charge", CHARGE, meta=meta("k-1"))

    assert shop.refunds == ["7"]
    assert text_of(first) == ["done 7"]
    assert REPLAYED_AT not in (first.meta or {})
    assert text_of(again)[0] == "done 7"
    assert text_of(again)[1].startswith("Nothing was done now: this is the recorded result of the same call")
    assert (again.meta or {})[REPLAYED_AT].endswith("+00:00")
    assert again.structured_content == first.structured_content == {"result": "done 7"}


async def test_a_call_with_another_key_is_another_call(shop: Shop) -> None:
    async with Client(shop.server) as client:
        await client.call_tool("charge", CHARGE, meta=meta("k-1"))
        await client.call_tool("charge", CHARGE, meta=meta("k-2"))

    assert shop.refunds == ["7", "7"]


async def test_a_key_in_the_arguments_is_the_key_of_the_caller(shop: Shop) -> None:
    """As the Agentic Commerce Protocol sends it."""
    async with Client(shop.server) as client:
        for _ in range(2):
            await client.call_tool("charge", {**CHARGE, "meta": {"idempotency_key": "k-1", "api": "1"}})
        await client.call_tool("charge", {**CHARGE, "meta": {"api": "1"}}, meta=meta("k-1"))
        reused = await client.call_tool("charge", {**CHARGE, "meta": {"api": "2"}}, meta=meta("k-1"))

    assert shop.refunds == ["7"]
    assert WORDS["reused"] in text_of(reused)[0]


async def test_the_tool_does_not_see_the_key(shop: Shop) -> None:
    async with Client(shop.server) as client:
        await client.call_tool("charge", {**CHARGE, "meta": {"idempotency_key": "k-1", "api": "1"}}, meta=meta("k-2"))

    given, of_the_request = shop.seen[0]
    assert given == {"api": "1"}
    assert KEY not in of_the_request


async def test_the_key_of_the_call_comes_before_the_one_in_its_arguments(shop: Shop) -> None:
    async with Client(shop.server) as client:
        await client.call_tool("charge", {**CHARGE, "meta": {"idempotency_key": "a"}}, meta=meta("k-1"))
        await client.call_tool("charge", {**CHARGE, "meta": {"idempotency_key": "b"}}, meta=meta("k-1"))
        await client.call_tool("charge", {**CHARGE, "meta": {"idempotency_key": "b"}})

    assert shop.refunds == ["7", "7"]


async def test_the_header_of_the_post_is_the_key_of_the_caller(shop: Shop) -> None:
    """Each of two clients sends it, quoted or not."""
    with shop.listening() as url:
        for value in ('"k-1"', "k-1"):
            async with over_http(url, {"Idempotency-Key": value}) as client:
                found = await client.call_tool("charge", CHARGE)
        async with over_http(url, {"Idempotency-Key": '"k-1"'}) as client:
            await client.call_tool("charge", CHARGE, meta=meta("k-2"))

    assert text_of(found)[0] == "done 7"
    assert shop.refunds == ["7", "7"]


@pytest.mark.parametrize("key", ["", 7, "k" * 256, {"a": 1}])
async def test_a_malformed_key_runs_nothing(shop: Shop, key: Any) -> None:
    async with Client(shop.server) as client:
        refused = await client.call_tool("refund", REFUND, meta=meta(key))

    assert refused.is_error
    assert WORDS["malformed"] in text_of(refused)[0]
    assert shop.refunds == []


async def test_a_malformed_header_runs_nothing(shop: Shop) -> None:
    with shop.listening() as url:
        async with over_http(url, {"Idempotency-Key": '"a", "b"'}) as client:
            refused = await client.call_tool("refund", REFUND)

    assert WORDS["malformed"] in text_of(refused)[0]
    assert shop.refunds == []


async def test_a_call_that_nothing_identifies_runs_nothing(shop: Shop) -> None:
    """The id of the request is no identity: a client that sends the call again gives it a new one."""
    async with Client(shop.server) as client:
        refused = await client.call_tool("charge", CHARGE)

    assert refused.is_error
    assert WORDS["nameless"] in text_of(refused)[0]
    assert shop.refunds == []


@pytest.mark.parametrize("mode", MODES)
async def test_a_call_of_the_same_intent_is_a_replay(shop: Shop, mode: Any) -> None:
    """The model planned anew, in another session, and left out what has a default."""
    for arguments in (REFUND, {**REFUND, "note": "", "amount": 5.0}):
        async with Client(shop.server, mode=mode) as client:
            found = await client.call_tool("refund", arguments)

    assert text_of(found)[0] == "done 7 5"
    assert shop.refunds == ["7 5"]


async def test_a_repeat_that_is_meant_is_done(shop: Shop) -> None:
    async with Client(shop.server) as client:
        for occurrence in (1, 2, 2):
            await client.call_tool("refund", {**REFUND, "occurrence": occurrence})

    assert shop.refunds == ["7 5", "7 5"]


async def test_the_same_intent_with_other_arguments_is_refused_in_words(shop: Shop) -> None:
    async with Client(shop.server) as client:
        await client.call_tool("refund", {**REFUND, "note": "secret-1"})
        refused = await client.call_tool("refund", {**REFUND, "note": "secret-2"})

    assert refused.is_error
    assert WORDS["reused"] in text_of(refused)[0]
    assert "secret" not in text_of(refused)[0]
    assert shop.refunds == ["7 5"]


# Calls that run, fail, or are given up.


async def test_two_agents_at_once_have_one_effect(shop: Shop) -> None:
    """The second is told that the first one runs, and gets its result then."""
    shop.finish.clear()
    with shop.listening() as url:
        async with over_http(url) as one, over_http(url) as other:
            first = asyncio.create_task(one.call_tool("refund", REFUND))
            await until(shop.running.is_set, "the first call")
            told = await other.call_tool("refund", REFUND)
            shop.finish.set()
            result = await first
            again = await other.call_tool("refund", REFUND)

    assert told.is_error
    assert WORDS["running"] in text_of(told)[0]
    assert text_of(result) == ["done 7 5"]
    assert text_of(again)[0] == "done 7 5"
    assert shop.refunds == ["7 5"]


@pytest.mark.parametrize("name", ["refund", "cancel"])
async def test_a_time_out_is_told_in_words(shop: Shop, name: str) -> None:
    """It is no failure after which the model may call again. A synchronous tool is no exception."""
    shop.failure = TimeoutError("the provider is slow")
    arguments = REFUND if name == "refund" else CHARGE
    async with Client(shop.server) as client:
        found = [await client.call_tool(name, arguments) for _ in range(2)]

    assert all(each.is_error and WORDS["unknown"] in text_of(each)[0] for each in found)
    assert len(shop.refunds) == 1


async def test_an_error_of_the_tool_lets_the_model_call_again(shop: Shop) -> None:
    shop.failure = ValueError("no such order")
    async with Client(shop.server) as client:
        failed = await client.call_tool("refund", REFUND)
        shop.failure = None
        found = await client.call_tool("refund", REFUND)

    assert failed.is_error
    assert text_of(failed) == ["Error executing tool refund"]
    assert text_of(found) == ["done 7 5"]


@pytest.mark.parametrize("mode", MODES)
async def test_a_call_goes_on_when_its_client_gives_up(shop: Shop, mode: Any) -> None:
    """The client tells the server that it cancels the call; the repeat gets the result."""
    shop.finish.clear()
    async with Client(shop.server, mode=mode) as client:
        with pytest.raises(MCPError, match="[Tt]imed out"):
            await client.call_tool("refund", REFUND, read_timeout_seconds=1)
        shop.finish.set()
        await until(lambda: shop.refunds, "the call")
        found = await result_of(client)

    assert text_of(found)[0] == "done 7 5"
    assert shop.refunds == ["7 5"]


async def test_a_call_goes_on_when_its_stream_breaks(shop: Shop) -> None:
    """The SDK cancels what it runs for a stream that ended, and the client has to send the call again."""
    shop.finish.clear()
    with shop.listening() as url:
        async with over_http(url) as client:
            pass
        with pytest.raises(httpx2.ReadTimeout):
            await post_raw(url, "refund", REFUND)
        await until(shop.running.is_set, "the call")
        async with over_http(url) as client:
            told = await client.call_tool("refund", REFUND)
            shop.finish.set()
            found = await result_of(client)

    assert WORDS["running"] in text_of(told)[0]
    assert text_of(found)[0] == "done 7 5"
    assert shop.refunds == ["7 5"]


async def post_raw(url: str, name: str, arguments: Any) -> None:
    """Send a call as a client does that loses its connection before the response."""
    version = "2026-07-28"
    request_meta = {
        "io.modelcontextprotocol/protocolVersion": version,
        "io.modelcontextprotocol/clientInfo": {"name": "raw", "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    body = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": name, "arguments": arguments, "_meta": request_meta},
    }
    headers = {
        "Accept": "application/json, text/event-stream",
        "MCP-Protocol-Version": version,
        "Mcp-Method": "tools/call",
        "Mcp-Name": name,
    }
    async with httpx2.AsyncClient(timeout=2) as client:
        response = await client.post(url, json=body, headers=headers)
        raise AssertionError(response.text)


async def result_of(client: Client) -> Any:
    """Call again while the answer is that the call runs, as its words say."""
    while True:
        found = await client.call_tool("refund", REFUND)
        if WORDS["running"] not in text_of(found)[0]:
            return found


@pytest.mark.processes
def test_a_killed_server_has_one_effect(sqlite_url: str, tmp_path: Path) -> None:
    """It is killed at each point of a call, and the client calls a new one, in a new session."""
    labels = ["after claim", "effect", "after complete"]
    report = crash_everywhere(VerifiedOverMcp, sqlite_url, str(tmp_path), only=labels)

    assert report.ok, str(report)
    assert report.held == ()


async def test_a_store_that_is_away_runs_nothing(shop: Shop) -> None:
    away = Shop(FaultyStore().order("claim", "fail"))
    async with Client(away.server) as client:
        refused = await client.call_tool("refund", REFUND)
        found = await client.call_tool("refund", REFUND)

    assert refused.is_error
    assert "Call again later with exactly the same arguments" in text_of(refused)[0]
    assert text_of(found) == ["done 7 5"]


# Rounds that ask for input.


async def test_rounds_of_one_call_are_one_operation(shop: Shop) -> None:
    """The question is no result: the client answers it in a call of its own, under the same key."""
    asked: list[str] = []

    async def answer(_: Any, params: Any) -> ElicitResult:
        asked.append(params.message)
        return ElicitResult(action="accept", content={"sure": True})

    for _ in range(2):
        async with Client(shop.server, elicitation_callback=answer) as client:
            found = await client.call_tool("close", {"account": "a"}, meta=meta("k-1"))

    assert text_of(found)[0] == "done close a"
    assert text_of(found)[1].startswith("Nothing was done now")
    assert asked == ["Close a?"]
    assert shop.refunds == ["close a"]


async def test_a_question_of_the_sdk_is_part_of_its_call(shop: Shop) -> None:
    """A person says no, which is a result that is an error; then yes. The yes is done once."""
    answers = [False, True, True]

    async def answer(_: Any, params: Any) -> ElicitResult:
        return ElicitResult(action="accept", content={"sure": answers.pop(0)})

    found = []
    for _ in range(3):
        async with Client(shop.server, elicitation_callback=answer) as client:
            found.append(await client.call_tool("delete", {"order_id": "7"}))

    assert [text_of(each)[0] for each in found] == ["ask again", "done delete 7", "done delete 7"]
    assert [each.is_error for each in found] == [True, False, False]
    assert shop.refunds == ["delete 7"]


@pytest.mark.stores("sqlite")
async def test_a_joined_tool_is_served(ledger: Ledger) -> None:
    """The model does not see the session; the annotations are those of the function."""
    tools = IdempotentTools()

    @tools.tool()
    @idempotent_tool(ledger.store, intent=("order_id",), session=ledger.sessions)
    async def refund(order_id: str, amount: int, session: AsyncSession) -> Refunded:
        await session.execute(ledger.insert(f"{order_id} {amount}"))
        return Refunded(refunded=amount)

    async with Client(MCPServer("shop", extensions=[tools])) as client:
        listed = (await client.list_tools()).tools[0]
        found = [await client.call_tool("refund", REFUND) for _ in range(2)]

    assert {name: each["type"] for name, each in listed.input_schema["properties"].items()} == {
        "order_id": "string",
        "amount": "integer",
    }
    assert [each.structured_content for each in found] == [{"refunded": 5}] * 2
    assert await ledger.effects() == ["7 5"]


# Who calls, and what is announced.


async def test_an_error_is_recorded_neither_if_it_is_raised_nor_if_it_is_returned() -> None:
    """The SDK makes one of the other: in both the tool says that nothing was done, unless it has called hold()."""
    tools, runs = IdempotentTools(), list[str]()

    @tools.tool()
    @idempotent_tool(MemoryStore(), intent=("order_id",))
    async def refund(order_id: str) -> CallToolResult:
        runs.append(order_id)
        if order_id == "raised":
            raise ToolError("the provider is busy")
        return CallToolResult(content=[TextContent(type="text", text="no answer in time")], is_error=True)

    async with Client(MCPServer("shop", extensions=[tools])) as client:
        answers = [await client.call_tool("refund", {"order_id": order}) for order in 2 * ("returned", "raised")]

    assert [answer.is_error for answer in answers] == [True] * 4
    assert runs == 2 * ["returned", "raised"]


async def test_callers_do_not_see_each_others_calls() -> None:
    """The access token names the caller, as the SDK checked it."""

    class Verifier:
        async def verify_token(self, token: str) -> AccessToken | None:
            return AccessToken(token=token, client_id=token, scopes=[], expires_at=None)

    shop = Shop(MemoryStore())
    issuer = AnyHttpUrl("https://issuer.test")
    auth = AuthSettings(issuer_url=issuer, resource_server_url=None)
    shop.server = MCPServer("shop", extensions=[shop.tools], token_verifier=Verifier(), auth=auth)
    with shop.listening() as url:
        for token in ("ann", "bob", "ann"):
            async with over_http(url, {"Authorization": f"Bearer {token}"}) as client:
                await client.call_tool("refund", REFUND)
                await client.call_tool("charge", CHARGE, meta=meta("1"))

    assert shop.refunds == ["7 5", "7"] * 2


async def test_the_caller_can_be_named_otherwise() -> None:
    """Agents of one tenant have different tokens, and work on the same orders."""
    shop = Shop(MemoryStore(), caller=lambda ctx: ctx.request.headers["tenant"])
    with shop.listening() as url:
        for agent, tenant in (("a", "north"), ("b", "north"), ("c", "south")):
            async with over_http(url, {"agent": agent, "tenant": tenant}) as client:
                await client.call_tool("refund", REFUND)

    assert shop.refunds == ["7 5", "7 5"]


async def test_what_is_idempotent_is_announced(shop: Shop) -> None:
    """A tool without an intent depends on the key of its caller: a call with the same arguments may be done again."""
    async with Client(shop.server) as client:
        tools = {each.name: each for each in (await client.list_tools()).tools}

    hints = {name: each.annotations and each.annotations.idempotent_hint for name, each in tools.items()}
    assert hints == {"refund": True, "charge": False, "cancel": True, "close": False, "delete": True}
    assert tools["refund"].description == "Refund an order."
    assert set(tools["charge"].input_schema["properties"]) == {"order_id", "meta"}


async def test_what_the_developer_says_of_a_tool_is_announced() -> None:
    tools = IdempotentTools()

    @tools.tool(title="Remind", annotations=ToolAnnotations(destructive_hint=False, idempotent_hint=False))
    @idempotent_tool(MemoryStore(), intent=("order_id",))
    async def remind(order_id: str) -> str:
        return order_id

    async with Client(MCPServer("shop", extensions=[tools])) as client:
        found = (await client.list_tools()).tools[0]

    assert found.title == "Remind"
    assert found.annotations == ToolAnnotations(destructive_hint=False, idempotent_hint=False)


async def test_other_tools_are_not_touched(shop: Shop) -> None:
    @shop.server.tool()
    async def look_up(order_id: str, meta: dict[str, Any]) -> str:
        return f"{order_id} {meta}"

    async with Client(shop.server) as client:
        found = await client.call_tool("look_up", {"order_id": "7", "meta": {"idempotency_key": "k"}})

    assert text_of(found) == ["7 {'idempotency_key': 'k'}"]


async def test_a_mistake_of_the_developer_is_logged(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """The model cannot mend it."""
    tools = IdempotentTools()

    @tools.tool()
    @idempotent_tool(MemoryStore(), intent=("order_id",))
    async def remind(order_id: str) -> Any:
        return object()

    async with Client(MCPServer("shop", extensions=[tools])) as client:
        found = await client.call_tool("remind", {"order_id": "7"})
        again = await client.call_tool("remind", {"order_id": "7"})

    assert text_of(found) == ["Error executing tool remind"]
    assert "annotate what it returns" in caplog.text
    assert "Its result was not recorded" in text_of(again)[0]


def test_a_function_that_is_not_decorated_is_refused() -> None:
    async def refund(order_id: str) -> str:
        return order_id

    with pytest.raises(ConfigurationError, match="decorate it with idempotent_tool first"):
        IdempotentTools().tool()(refund)


def test_a_tool_that_no_server_would_serve_is_refused(shop: Shop) -> None:
    with pytest.raises(ConfigurationError, match="before MCPServer"):
        shop.tools.tool()

"""What the adapter of every framework keeps, in the tool loop of the framework itself."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest

from idempotency import Policy, open_store
from idempotency.errors import ConfigurationError
from idempotency.tool import approve, idempotent_tool
from tests.kit.paths import ROOT
from tests.tools.frameworks.rig import Rig, refund_call

INTENT = ("order_id", "amount")
REPLAYED = "Nothing was done now: this is the recorded result"
MAY_BE_DONE = "may have been done"
DO_NOT_REPEAT = "Do not call it again"


class ToolLoopContract:
    """The tests of one framework; ``rig`` is its agent."""

    rig: ClassVar[type[Rig]]

    @pytest.fixture
    def agent(self, tmp_path: Path) -> Callable[..., Rig]:
        def make(function: Any, **options: Any) -> Rig:
            return self.rig(function, directory=str(tmp_path), **options)

        return make

    async def test_a_call_that_is_resumed_twice_is_done_once(self, store, refunds, agent) -> None:
        """The id of the call is enough, as it is the same at each resume."""
        clerk = agent(refunds.tool(store))
        saved = await clerk.save(refund_call("call-1"))

        (first,) = await clerk.resume(saved)
        (second,) = await clerk.resume(saved)

        assert first.text == "refund 1 of 5"
        assert second.text.startswith("refund 1 of 5\n\n" + REPLAYED)
        assert refunds.made == ["order-7 5"]

    async def test_a_call_that_the_model_makes_anew_is_done_once_by_its_intent(self, store, refunds, agent) -> None:
        """The model planned anew, so the id is another one."""
        clerk = agent(refunds.tool(store, intent=INTENT))

        first, second = await clerk.talk([refund_call("call-1")], [refund_call("call-2")])

        assert first.text == "refund 1 of 5"
        assert second.text.startswith("refund 1 of 5\n\n" + REPLAYED)
        assert refunds.made == ["order-7 5"]

    async def test_a_call_that_the_model_makes_anew_is_done_twice_without_intent(self, store, refunds, agent) -> None:
        """Nothing says that the second call is not another refund."""
        clerk = agent(refunds.tool(store))

        await clerk.talk([refund_call("call-1")], [refund_call("call-2")])

        assert refunds.made == ["order-7 5", "order-7 5"]

    async def test_an_id_in_another_conversation_is_another_call(self, store, refunds, agent) -> None:
        """Some providers number the calls of each conversation anew."""
        clerk = agent(refunds.tool(store))

        await clerk.talk([refund_call("call-1")], conversation="one")
        await clerk.talk([refund_call("call-1")], conversation="other")

        assert refunds.made == ["order-7 5", "order-7 5"]

    async def test_an_intent_with_other_arguments_is_refused(self, store, refunds, agent) -> None:
        """The model changed its mind about the amount, after the refund."""
        clerk = agent(refunds.tool(store, intent=("order_id",)))

        _, second = await clerk.talk([refund_call("call-1")], [refund_call("call-2", amount=6)])

        assert "called before with other arguments" in second.text
        assert refunds.made == ["order-7 5"]

    async def test_a_repeat_that_is_meant_is_done(self, store, refunds, agent) -> None:
        """The occurrence is one of the arguments that say what is meant."""

        @idempotent_tool(store, name="refund", intent=(*INTENT, "occurrence"))
        async def refund(order_id: str, amount: int, occurrence: int = 1) -> str:
            """Refund an order."""
            return refunds.make(order_id, amount)

        await agent(refund).talk([refund_call("call-1")], [refund_call("call-2", occurrence=2)])

        assert refunds.made == ["order-7 5", "order-7 5"]

    async def test_two_calls_of_one_message_are_done_once(self, store, refunds, agent) -> None:
        """The framework executes them at the same time."""
        clerk = agent(refunds.tool(store, intent=INTENT))

        await clerk.talk([refund_call("call-1"), refund_call("call-2")])

        assert refunds.made == ["order-7 5"]

    async def test_two_agents_at_once_refund_once(self, store, refunds, agent) -> None:
        """The second agent hears that the first one is at it."""
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def wait() -> None:
            begun.set()
            await go_on.wait()

        refund = refunds.tool(store, wait, intent=INTENT)
        first = asyncio.create_task(agent(refund).talk([refund_call("call-1")], conversation="one"))
        await begun.wait()
        (second,) = await agent(refund).talk([refund_call("call-1")], conversation="other")
        go_on.set()

        assert "being done right now" in second.text
        assert [answer.text for answer in await first] == ["refund 1 of 5"]
        assert refunds.made == ["order-7 5"]

    async def test_callers_do_not_see_each_others_results(self, store, refunds, agent) -> None:
        """What is meant is the same, and who means it is not."""
        refund = refunds.tool(store, intent=INTENT)

        await agent(refund, caller="ann").talk([refund_call("call-1")], conversation="one")
        (bob,) = await agent(refund, caller="bob").talk([refund_call("call-1")], conversation="other")

        assert bob.text == "refund 2 of 5"

    async def test_a_caller_that_is_no_text_runs_nothing(self, store, refunds, agent) -> None:
        """The user 0 is not taken for no caller."""
        refund = refunds.tool(store, intent=INTENT)

        with suppress(ConfigurationError):
            await agent(refund, caller=0).talk([refund_call("call-1")])

        assert refunds.made == []

    async def test_a_tool_that_the_framework_cuts_off_is_not_done_again(self, store, refunds, agent) -> None:
        """Its time is over after the refund. No later call refunds, whatever the framework says."""
        clerk = agent(refunds.tool(store, _never, intent=INTENT), timeout=2)

        first, second = await clerk.talk([refund_call("call-1")], [refund_call("call-2")])

        assert MAY_BE_DONE in first.text
        assert MAY_BE_DONE in second.text
        assert DO_NOT_REPEAT in second.text
        assert refunds.made == ["order-7 5"]

    async def test_the_model_does_not_repeat_a_call_without_intent_that_is_cut_off(self, store, refunds, agent) -> None:
        """Its next call would have another id, and refund again."""
        clerk = agent(refunds.tool(store, _never), timeout=2)

        (only,) = await clerk.talk([refund_call("call-1")])

        assert MAY_BE_DONE in only.text
        assert DO_NOT_REPEAT in only.text

    async def test_a_tool_that_the_framework_cuts_off_is_verified(self, store, refunds, agent) -> None:
        """The next call finds the refund."""
        # Long enough for the second call, which has to find the refund.
        clerk = agent(refunds.tool(store, _never, intent=INTENT, verify=refunds.find), timeout=4)

        _, second = await clerk.talk([refund_call("call-1")], [refund_call("call-2")])

        assert second.text.startswith("found a refund of 5")
        assert refunds.made == ["order-7 5"]

    async def test_an_approval_is_for_exactly_these_arguments(self, store, refunds, agent) -> None:
        """A person approved a refund of 5; the model then makes one of 6."""
        refund = refunds.tool(store, intent=("order_id",), approval=True)
        await approve(refund, {"order_id": "order-7", "amount": 5}, by="ann")

        other, approved = await agent(refund).talk([refund_call("call-1", amount=6)], [refund_call("call-2")])

        assert "needs the approval of a person" in other.text
        assert approved.text == "refund 1 of 5"
        assert refunds.made == ["order-7 5"]

    @pytest.mark.processes
    async def test_a_process_that_is_killed_and_another_that_goes_on_refund_once(
        self, tmp_path, refunds, agent
    ) -> None:
        """It is killed after the refund. Another one goes on with the conversation, and verify= finds the refund."""
        store = open_store(f"sqlite+aiosqlite:///{tmp_path}/records.db")
        policy = Policy(on_crash="hold", lease=0.5, wait=10)
        saved = await agent(refunds.tool(store)).save(refund_call("call-1"))
        await asyncio.to_thread(_resume_and_die, self.rig, tmp_path, saved)

        (unknown,) = await agent(refunds.tool(store, policy=policy)).resume(saved)
        (found,) = await agent(refunds.tool(store, policy=policy, verify=refunds.find)).resume(saved)
        await store.aclose()

        assert MAY_BE_DONE in unknown.text
        assert DO_NOT_REPEAT in unknown.text
        assert found.text.startswith("found a refund of 5")
        assert refunds.made == ["order-7 5"]


async def _never() -> None:
    await asyncio.Event().wait()


def _resume_and_die(rig: type[Rig], directory: Path, saved: str) -> None:
    child = [sys.executable, "-m", "tests.tools.frameworks.child", rig.__module__, rig.__name__, str(directory)]
    run = subprocess.run(child, input=saved, text=True, cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert run.returncode == -9, run.stderr

"""The rig of the OpenAI Agents SDK: a conversation is saved as a RunState that waits for an approval."""

from __future__ import annotations

from typing import Any

from agents import Agent, RunConfig, Runner, RunState
from agents.items import ToolCallOutputItem
from agents.testing import ScriptedModel, assistant_message, function_call

from idempotency.adapters.openai_agents import idempotent_function_tool
from tests.tools.frameworks.rig import CONVERSATION, Answer, Call, Rig


class OpenAIAgentsRig(Rig):
    """An agent of the OpenAI Agents SDK."""

    def _agent(self, turns: list[list[Call]], *, approval: bool = False) -> Agent[Any]:
        steps = [[function_call(self._name, call.arguments, call_id=call.id) for call in calls] for calls in turns]
        model = ScriptedModel([*steps, [assistant_message("done")]])
        return Agent(name="clerk", model=model, tools=[self._tool(approval)])

    def _tool(self, approval: bool) -> Any:
        return idempotent_function_tool(caller=lambda _: self.caller, needs_approval=approval, timeout=self.timeout)(
            self.function
        )

    @property
    def _name(self) -> str:
        return self.function.__name__

    async def talk(self, *turns: list[Call], conversation: str = CONVERSATION) -> list[Answer]:
        result = await Runner.run(self._agent([*turns]), "Refund it.", run_config=_config(conversation))
        return answers_of(result)

    async def save(self, *calls: Call, conversation: str = CONVERSATION) -> str:
        agent = self._agent([[*calls]], approval=True)
        result = await Runner.run(agent, "Refund it.", run_config=_config(conversation), context={"run": conversation})
        state = result.to_state()
        for interruption in result.interruptions:
            state.approve(interruption)
        return state.to_string()

    async def resume(self, saved: str) -> list[Answer]:
        agent = self._agent([], approval=True)
        state: RunState[Any, Any] = await RunState.from_string(agent, saved)
        conversation = state._context.context["run"]
        result = await Runner.run(agent, state, run_config=_config(conversation))
        return answers_of(result)


def _config(conversation: str) -> RunConfig:
    return RunConfig(group_id=conversation, tracing_disabled=True)


def answers_of(result: Any) -> list[Answer]:
    """Read what the model was answered in a run."""
    outputs = [item for item in result.new_items if isinstance(item, ToolCallOutputItem)]
    return [Answer(item.raw_item["call_id"], item.raw_item["output"]) for item in outputs]

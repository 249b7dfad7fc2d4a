"""The rig of Pydantic AI: a conversation is saved as its messages."""

from __future__ import annotations

from typing import Any

from pydantic_ai import Agent, Tool
from pydantic_ai.messages import (
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
)
from pydantic_ai.models.function import FunctionModel

from idempotency.adapters.pydantic_ai import IdempotentTools
from tests.tools.frameworks.rig import CONVERSATION, Answer, Call, Rig


class PydanticAIRig(Rig):
    """An agent of Pydantic AI."""

    def _agent(self, turns: list[list[Call]]) -> Agent[None, str]:
        answers = iter([[self._call(call) for call in calls] for calls in turns])

        async def model(messages: list[ModelMessage], info: Any) -> ModelResponse:
            return ModelResponse(parts=next(answers, [TextPart("done")]))

        return Agent(
            FunctionModel(model),
            tools=[Tool(self.function, timeout=self.timeout)],
            capabilities=[IdempotentTools(caller=lambda _: self.caller)],
        )

    def _call(self, call: Call) -> ToolCallPart:
        return ToolCallPart(self.function.__name__, call.arguments, tool_call_id=call.id)

    async def talk(self, *turns: list[Call], conversation: str = CONVERSATION) -> list[Answer]:
        result = await self._agent([*turns]).run("Refund it.", conversation_id=conversation)
        return answers_of(result.all_messages())

    async def save(self, *calls: Call, conversation: str = CONVERSATION) -> str:
        async with self._agent([[*calls]]).iter("Refund it.", conversation_id=conversation) as run:
            async for node in run:
                if Agent.is_call_tools_node(node):
                    break
            return ModelMessagesTypeAdapter.dump_json(run.all_messages()).decode()

    async def resume(self, saved: str) -> list[Answer]:
        result = await self._agent([]).run(message_history=ModelMessagesTypeAdapter.validate_json(saved))
        return answers_of(result.all_messages())


def answers_of(messages: list[ModelMessage]) -> list[Answer]:
    """Read what the model was answered in a run."""
    parts = [part for message in messages if isinstance(message, ModelRequest) for part in message.parts]
    returned = [part for part in parts if isinstance(part, ToolReturnPart)]
    return [Answer(part.tool_call_id, part.model_response_str(), part.outcome != "success") for part in returned]

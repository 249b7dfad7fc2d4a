"""The adapter in its framework."""

from __future__ import annotations

from tests.tools.frameworks.installed import require

require("pydantic_ai", "pydantic-ai-slim")

from tests.tools.frameworks.contract import ToolLoopContract
from tests.tools.frameworks.pydantic_ai_rig import PydanticAIRig


class TestPydanticAI(ToolLoopContract):
    """The contract."""

    rig = PydanticAIRig

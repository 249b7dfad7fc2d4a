"""The adapter in its framework."""

from __future__ import annotations

from tests.tools.frameworks.installed import require

require("agents", "openai-agents")

from tests.tools.frameworks.contract import ToolLoopContract
from tests.tools.frameworks.openai_agents_rig import OpenAIAgentsRig


class TestOpenAIAgents(ToolLoopContract):
    """The contract."""

    rig = OpenAIAgentsRig

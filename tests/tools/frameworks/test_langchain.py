"""The adapter in its framework."""

from __future__ import annotations

from tests.tools.frameworks.installed import require

require("langchain", "langchain")

from tests.tools.frameworks.contract import ToolLoopContract
from tests.tools.frameworks.langchain_rig import LangChainRig


class TestLangChain(ToolLoopContract):
    """The contract."""

    rig = LangChainRig

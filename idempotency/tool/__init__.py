"""Tools of agents that take effect once, however often the model, the framework or the network repeats a call."""

from idempotency.tool._call import ToolCall, tool_call
from idempotency.tool._decorated import approve, approve_sync, is_idempotent_tool, repeats_have_no_effect
from idempotency.tool._decorator import idempotent_tool
from idempotency.tool._explain import explain, explain_interruption
from idempotency.tool._unknown import NOT_DONE, NotDone

__all__ = [
    "NOT_DONE",
    "NotDone",
    "ToolCall",
    "approve",
    "approve_sync",
    "explain",
    "explain_interruption",
    "idempotent_tool",
    "is_idempotent_tool",
    "repeats_have_no_effect",
    "tool_call",
]

"""The verdict: whether the answers and effects of each operation are as docs/guarantees.md says."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from operator import attrgetter, itemgetter
from typing import Any

from _soak.clients import Answer, Book, allowance
from _soak.places import Struck
from _soak.plan import LEASE, Operation

COUNTED = ("lost", "doubled", "stuck", "unexpected answers")
LEASED = ("leased", "hold")
ENDS_A_WORKER = ("kill the worker", "stop the worker")
EXPECTED = (
    r"\A(ERROR|WARNING):\s+Cancel \d+ running task\(s\), timeout graceful shutdown exceeded",
    r"asyncio\.exceptions\.CancelledError(: Task cancelled, timeout graceful shutdown exceeded)?\s*\Z",
    r"\Aquery cancellation (interrupted|failed)",
    r"\AFuture exception was never retrieved\n.*unexpected connection_lost\(\) call",
    r"\AException during reset or similar",
)
"""What a worker may write: uvicorn when it cancels requests at a graceful stop, psycopg when it abandons a query,
asyncpg when a connection attempt is cancelled while the server hangs up, SQLAlchemy's pool when it drops a connection
that was lost."""

CONTINUED = (
    r"\s|[\[(]|Traceback|During handling|The above exception|(future|task|transport|handle): |[\w.]+(Error|Exception)\b"
)
"""How a line begins that belongs to the line before it: in tracebacks and their causes, and of asyncio."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with one operation."""

    kind: str
    mode: str
    key: str
    words: str


@dataclass
class Verdict:
    """What was counted in a run on one store."""

    faults: list[Fault] = field(default_factory=list)
    repeats: Counter[str] = field(default_factory=Counter)
    leaked: dict[str, list[str]] = field(default_factory=lambda: {"connections": [], "tasks": [], "files": []})
    outbursts: list[str] = field(default_factory=list)

    def count(self, kind: str, mode: str) -> int:
        """Return how many operations of a mode have a fault of this kind."""
        return len({fault.key for fault in self.faults if (fault.kind, fault.mode) == (kind, mode)})


class Ledger:
    """Everything that is known about a run: answers, effects, what handlers did, and the chaos."""

    def __init__(
        self,
        book: Book,
        effects: list[tuple[str, str]],
        trace: list[dict[str, Any]],
        struck: list[Struck],
        deadline: float,
        on_sql: bool = True,
    ) -> None:
        self.book = book
        self.struck = struck
        self.deadline = deadline
        self._on_sql = on_sql
        self._effects: dict[str, list[str]] = defaultdict(list)
        for key, run in effects:
            self._effects[key].append(run)
        self.trace: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in trace:
            self.trace[line["key"]].append(line)
        # What the workers noticed themselves: load has the same effects as chaos.
        self._stalls = [
            Struck(line["what"], line["worker"], line["at"] - line["seconds"], line["at"])
            for line in self.trace.pop("", [])
        ]

    def judge(self) -> Verdict:
        """Judge every operation."""
        verdict = Verdict()
        for operation in self.book.operations.values():
            self._judge(operation, verdict)
        return verdict

    def effects_of(self, operation: Operation) -> list[str]:
        """Return the runs that had an effect, once for each effect."""
        if self.is_leased(operation):
            return [line["run"] for line in self.trace[operation.key] if line["what"] == "effect"]
        return self._effects[operation.key]

    def is_leased(self, operation: Operation) -> bool:
        return operation.mode in LEASED or (operation.mode == "consumer" and not self._on_sql)

    def _judge(self, operation: Operation, verdict: Verdict) -> None:
        def fault(kind: str, words: str) -> None:
            verdict.faults.append(Fault(kind, operation.mode, operation.key, words))

        answers, effects = self.book.answers[operation.key], self.effects_of(operation)
        final = [answer for answer in answers if answer.final]
        if not any(answer.at <= self.deadline + allowance(operation) for answer in final):
            fault("stuck", "no final answer within two leases after the chaos")
        elif not answers[-1].final:
            fault("stuck", "no final answer when asked again")
        for answer in final:
            if flaw := self._flaw(operation, answer):
                fault("unexpected answers", flaw)
            elif answer.code == "ok" and answer.run not in effects:
                fault("lost", f"run {answer.run} was answered as a success, and has no effect")
        if len({line["derived"] for line in self.trace[operation.key] if line["what"] == "effect"}) > 1:
            fault("doubled", "the runs derived different keys")
        expected = 0 if operation.shape == "refuse" else 1
        if len(effects) > expected:
            if self._excused(operation):
                verdict.repeats[operation.mode] += len(effects) - 1
            else:
                fault("doubled", f"{len(effects)} effects: {', '.join(effects)}")
        elif len({answer.run for answer in final if answer.run}) > 1:
            fault("unexpected answers", "two clients were answered by different runs")

    def _flaw(self, operation: Operation, answer: Answer) -> str:
        """Return what is wrong with a final answer by itself, or an empty text."""
        held = operation.mode == "hold" or operation.shape == "hold"
        match answer.code:
            case "ok" if operation.shape != "refuse" and answer.run:
                return ""
            case "refused" if operation.shape == "refuse":
                return ""
            case "outcome-unknown" if held:
                later = self._runs_after(operation, answer)
                return f"run {later} began after the answer that the outcome is unknown" if later else ""
            case "ok" | "completed-not-replayable" if self._may_lose_result(operation, answer):
                return ""
        return f"{answer.status} {answer.code} {answer.words}".strip()

    def _runs_after(self, operation: Operation, unknown: Answer) -> str:
        """Return a run that began after an answer that the outcome is unknown, unless the guarantees allow it."""
        lines = self.trace[operation.key]
        began = [line for line in lines if line["what"] == "began"]
        before = [line for line in began if line["at"] <= unknown.at]
        if any(line["what"] == "raised" for line in lines):
            return ""  # the key of a handler that raised is released once the store is back
        if not before and self._claimed_elsewhere(operation, unknown):
            return ""  # a claim whose answer was lost makes the outcome unknown until it is released
        joined = operation.mode != "transactional" and not self.is_leased(operation)
        if joined and any(self._seconds_cut_off(line, unknown.at) for line in before):
            return ""  # the store was away when the outcome was to be held
        return next((str(line["run"]) for line in began if line["at"] > unknown.at), "")

    def _claimed_elsewhere(self, operation: Operation, unknown: Answer) -> bool:
        """Return whether another process, or one that ended, may have claimed the key without getting the answer."""
        lost = [
            answer
            for answer in self.book.answers[operation.key]
            if answer.code in ("no answer", "store-unavailable") and answer.asked < unknown.at
        ]
        since = min((answer.asked for answer in lost), default=math.inf)
        return any(answer.worker != unknown.worker for answer in lost) or any(
            each.kind in ENDS_A_WORKER and each.worker == unknown.worker and since < each.begin < unknown.at
            for each in self.struck
        )

    def _excused(self, operation: Operation) -> bool:
        """Return whether docs/guarantees.md allows each repeat of a leased effect."""
        if not self.is_leased(operation):
            return False
        lines = self.trace[operation.key]
        began = {line["run"]: line for line in lines if line["what"] == "began"}
        released = {line["run"] for line in lines if line["what"] == "raised" and operation.shape != "hold"}
        runs = sorted((began[run] for run in self.effects_of(operation)), key=itemgetter("at"))
        return all(
            first["run"] in released or (operation.mode != "hold" and self._may_lose(first, second["at"]))
            for first, second in pairwise(runs)
        )

    def _may_lose_result(self, operation: Operation, answer: Answer) -> bool:
        """Return whether the store was away so long that the operation may be recorded without its result."""
        began = [line for line in self.trace[operation.key] if line["what"] == "began"]
        return self.is_leased(operation) and any(self._may_lose(line, answer.at) for line in began)

    def _may_lose(self, run: dict[str, Any], until: float) -> bool:
        """Return whether the owner died, or could not reach the store until a renewal was missed."""
        return self._seconds_cut_off(run, until) >= LEASE / 3

    def _seconds_cut_off(self, run: dict[str, Any], until: float) -> float:
        """Return how many seconds a run's worker did not reach the store or did not run; infinite if it ended."""
        cut_off, reached = 0.0, float(run["asked"])
        for each in sorted((*self.struck, *self._stalls), key=attrgetter("begin")):
            if each.worker in (None, run["worker"]) and each.begin < until and each.end > run["asked"]:
                # Times that overlap count once.
                cut_off += max(0.0, min(each.end, until) - max(each.begin, reached))
                reached = max(reached, each.end)
                if each.kind in ENDS_A_WORKER:
                    return math.inf
        return cut_off

    def timeline(self, key: str) -> list[str]:
        """Return what happened to one operation, in order of time, with the chaos around it."""
        answers = self.book.answers[key]
        moments = [(answer.at, describe(answer)) for answer in answers]
        moments += [
            (line["at"], f"worker {line['worker']}: run {line['run']} {line['what']}") for line in self.trace[key]
        ]
        begin, end = min(answer.asked for answer in answers) - LEASE, max(moments)[0]
        for each in (*self.struck, *self._stalls):
            if each.begin < end and each.end > begin:
                worker = "" if each.worker is None else f" {each.worker}"
                moments.append((each.begin, f"{each.kind}{worker}, for {each.end - each.begin:.2f} s"))
        lines, since = [], min(moments)[0]
        for words, group in groupby(sorted(moments), key=itemgetter(1)):
            first, *others = group
            lines.append(f"{first[0] - since:7.2f} s  {words}" + f", and {len(others)} times more" * bool(others))
        return lines


def describe(answer: Answer) -> str:
    """Describe an answer in one line."""
    if not answer.status:
        return f"worker {answer.worker} gave no answer"
    return " ".join(
        filter(None, (f"worker {answer.worker} answered {answer.status} {answer.code}", answer.run, answer.words))
    )


def outbursts(log: str) -> list[str]:
    """Return what a worker wrote that is not expected: one text for each line, or traceback with its last line."""
    blocks: list[str] = []
    for line in log.splitlines():
        goes_on = re.match(CONTINUED, line) or not line
        if blocks and (goes_on or _open_traceback(blocks[-1])):
            blocks[-1] += f"\n{line}"
        elif line.strip():
            blocks.append(line)
    return [without_names(block) for block in blocks if not re.search("|".join(EXPECTED), block)]


def without_names(block: str) -> str:
    """Remove what differs between two texts of one kind, such as addresses and the numbers of tasks."""
    return re.sub(r"0x[0-9a-f]+|(?<=Task-)\d+|\b\d{4,}\b", "*", block)


def _open_traceback(block: str) -> bool:
    """Return whether the line with the exception itself is still to come."""
    return block.rfind("Traceback (most recent call last)") > -1 and block.splitlines()[-1].startswith(
        (" ", "Traceback")
    )

"""Run clients side by side: the argument names their modules and keys, in phases; an answer is one line of JSON."""

from __future__ import annotations

import json
import runpy
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ORDER = {"name": "tea"}


def run(name: str, module: dict[str, Any], key: str | None) -> dict[str, Any]:
    """Place an order and return what came back."""
    begin = time.monotonic()
    answer: dict[str, Any]
    try:
        answer = {"id": id_of(module["place_order"](ORDER, key))}
    except Exception as error:
        answer = {"error": type(error).__name__}
    return {"case": name, "seconds": time.monotonic() - begin, **answer}


def id_of(placed: Any) -> str:
    """Read the id of an order, in a response or as it is."""
    order = placed.json() if type(placed).__name__.endswith("Response") else placed
    return order["id"]


if __name__ == "__main__":
    phases = [[(name, runpy.run_path(file), key) for name, file, key in phase] for phase in json.loads(sys.argv[1])]
    for clients in filter(None, phases):
        with ThreadPoolExecutor(len(clients)) as pool:
            for answer in pool.map(run, *zip(*clients, strict=True)):
                print(json.dumps(answer))

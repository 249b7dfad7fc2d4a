"""A process that makes one named call, and prints the status of its answer: ``store options url``."""

from __future__ import annotations

import json
import sys

import httpx

from idempotency import open_store
from idempotency.client import IdempotentTransport

if __name__ == "__main__":
    store = open_store(sys.argv[1], **json.loads(sys.argv[2]))
    with httpx.Client(transport=IdempotentTransport(store=store), trust_env=False, timeout=60) as client:
        print(client.post(sys.argv[3], json={"item": "tea"}, extensions={"idempotency": "invoice-7"}).status_code)
    store.close()

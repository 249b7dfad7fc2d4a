"""The queue of the Celery rigs, as a worker and a publisher see it."""

from __future__ import annotations

import uuid
from typing import Any

from celery import Celery
from kombu import Exchange, Queue

VISIBILITY = 2
"""Seconds after which Redis gives a message that is not acknowledged to another worker; rounded up to full ones."""

PREFORK = ["--pool", "prefork", "--concurrency", "2"]
SOLO = ["--pool", "solo"]
THREADS = ["--pool", "threads", "--concurrency", "2"]

_WORKER = ["-m", "celery", "-A", "tests.adapters.rigs.celery_app", "--quiet", "worker", "--loglevel", "WARNING"]
_ALONE = ["--without-gossip", "--without-mingle", "--without-heartbeat"]


def worker(pool: list[str]) -> list[str]:
    """Say how a worker is started."""
    # A name of its own: RabbitMQ gives the queue of a worker's commands to one connection only.
    return [*_WORKER, *_ALONE, "--hostname", f"{uuid.uuid4().hex[:8]}@%h", *pool]


def application(place: str, url: str, visibility: float = VISIBILITY, **more: Any) -> Celery:
    """Make a Celery application whose one queue is ``place``; all that it leaves at its broker begins so."""
    dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{place}_dead"}
    app = Celery("brokers", broker=url, set_as_current=False)
    app.conf.update(
        task_default_queue=place,
        task_queues=[Queue(place, Exchange(""), routing_key=place, queue_arguments=dead)],
        event_exchange=f"{place}_events",
        control_exchange=f"{place}_control",
        worker_prefetch_multiplier=1,
        worker_lost_wait=0.1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        **more,
    )
    if url.startswith("redis"):
        app.conf.broker_transport_options = {
            "global_keyprefix": f"{place}:",
            "visibility_timeout": visibility,
            "unacked_restore_interval": 0.5,
            "unacked_restore_throttle": 1,
        }
    return app

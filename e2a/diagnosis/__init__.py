"""Everything that `manage.py doctor` looks at, in the order in which it is told."""

from __future__ import annotations

from functools import partial

from e2a.core.diagnosis import Look
from e2a.diagnosis.mail import mail_findings
from e2a.diagnosis.processes import process_findings
from e2a.diagnosis.services import clock_findings, database_findings, key_findings, redis_findings
from sandboxes.diagnosis.engine import engine_findings
from sandboxes.diagnosis.images import image_findings
from sandboxes.diagnosis.machine import LEAST_FREE_GIB, disk_findings, kernel_findings
from sandboxes.diagnosis.nodes import broker_findings, node_findings, pool_findings


def looks(*, least_free_gib: float = LEAST_FREE_GIB) -> list[Look]:
    return [
        Look("settings and keys", key_findings),
        Look("database", database_findings),
        Look("redis", redis_findings),
        Look("clock", clock_findings),
        Look("engine", engine_findings, limit_seconds=20),
        Look("images", image_findings, limit_seconds=15),
        Look("disk", partial(disk_findings, least_free_gib=least_free_gib), limit_seconds=15),
        Look("kernel", kernel_findings),
        Look("nodes", node_findings),
        Look("broker", broker_findings),
        Look("processes", process_findings, limit_seconds=15),
        Look("pool", pool_findings),
        Look("mail", mail_findings, limit_seconds=20),
    ]

"""On what, and beside what, was measured."""

from __future__ import annotations

import datetime as dt
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import docker

ROOT = Path(__file__).resolve().parent.parent


def load_average() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def conditions() -> dict[str, str]:
    """What is known before the run, in the order in which it is shown."""
    client = docker.from_env()
    try:
        engine, containers = client.version(), len(client.containers.list())
    finally:
        client.close()
    runc = next((part["Version"] for part in engine.get("Components", ()) if part["Name"] == "runc"), "?")
    packages = ("Django", "uvicorn", "celery", "redis", "websockets", "docker")
    return {
        "Date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": f"{_processor()}, {os.cpu_count()} CPUs, {_memory_gib():.0f} GiB",
        "Kernel": f"{platform.system()} {platform.release()}",
        "Docker": f"{engine['Version']}, runc {runc}",
        "Software": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in packages),
        "Revision": _revision(),
        "Load average before": load_average(),
        "Containers of others running before": str(containers),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _revision() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    if not commit:
        return "not a git work tree"
    return commit + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")

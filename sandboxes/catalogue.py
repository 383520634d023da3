"""The templates that are built: what a sandbox can be made from. Rows follow this table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from decimal import Decimal

from sandboxes.models import Template


@dataclass(frozen=True, slots=True)
class TemplateEntry:
    """One template. `agents` are the kinds of agent that its image can run."""

    name: str
    description: str
    vcpu: Decimal
    memory_mib: int
    disk_mib: int
    agents: tuple[str, ...]
    pids: int = 256
    shm_mib: int = 64


CATALOGUE: tuple[TemplateEntry, ...] = (
    TemplateEntry(
        name="standard",
        description="Debian with Python and the usual command-line tools. Its working folder is /workspace.",
        vcpu=Decimal("0.5"),
        memory_mib=512,
        disk_mib=2048,
        agents=("deictic", "claude-code", "codex", "shell"),
    ),
    TemplateEntry(
        name="browser",
        description="Headless Chromium, and Playwright for Python to drive it.",
        vcpu=Decimal(1),
        memory_mib=1024,
        disk_mib=4096,
        agents=("deictic", "shell"),
        pids=512,
        shm_mib=256,
    ),
    TemplateEntry(
        name="cua",
        description="A desktop for computer use: Xvfb, window manager, Chromium, VNC, xdotool, screenshots.",
        vcpu=Decimal(1),
        memory_mib=2048,
        disk_mib=4096,
        agents=("deictic", "shell"),
        pids=512,
        shm_mib=256,
    ),
    TemplateEntry(
        name="canvas",
        description="Draws HTML pages and their canvases to PNG: canvas-render page.html picture.png.",
        vcpu=Decimal(1),
        memory_mib=1024,
        disk_mib=2048,
        agents=("deictic", "shell"),
        pids=512,
        shm_mib=256,
    ),
)


WITHOUT_DESKTOP = frozenset({"standard", "browser", "canvas"})
"""The dashboard offers no desktop there. An operator's own image may have one: nobody knows before it is asked."""


def templates_sync() -> None:
    """Make the rows say what the catalogue says. `image` and `image_id` are the node's to set; twice is
    fine."""
    for entry in CATALOGUE:
        values = asdict(entry) | {"agents": list(entry.agents)}
        name = values.pop("name")
        Template.objects.update_or_create(
            name=name, defaults=values, create_defaults=values | {"image": f"e2a/{name}"}
        )

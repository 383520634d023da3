"""What the reference pages promise to hold is held to the code; the tutorial's program runs as it stands."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from django.core.management import get_commands

from sandboxes import socket_access as sandbox_access
from sandboxes import terminal_frames
from sandboxes.models import DeathReason
from sessions_app import client_frames, frames, socket_access
from sessions_app.llm.base import ErrorCode
from sessions_app.models import SessionStatus, StopReason
from tests.live import LiveStack
from tests.product.documents import DOCS, ROOT, blocks_of, first_column

APPS = ("e2a", "accounts", "keys", "secrets_vault", "sandboxes", "sessions_app")
REFERENCE = DOCS / "reference"

CODE_IS_FIRST = frozenset({"BadFrame", "Failure", "ModelError", "bad_frame", "complain", "fail"})
CODE_IS_SECOND = frozenset({"of", "_refusal", "FieldError"})
_LOOKS_LIKE_A_CODE = re.compile(r"[a-z][a-z0-9_]+")


def _sources() -> Iterator[tuple[Path, ast.Module]]:
    """Our modules, but for the guest, whose codes are in its own protocol page, and the doctor's findings."""
    for app in APPS:
        for path in sorted((ROOT / app).rglob("*.py")):
            if not {"migrations", "guest", "diagnosis"} & set(path.parts):
                yield path, ast.parse(path.read_text())


def _text(node: ast.expr) -> Iterator[str]:
    if (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and _LOOKS_LIKE_A_CODE.fullmatch(node.value)
    ):
        yield node.value


def _codes_of_class(node: ast.ClassDef) -> Iterator[str]:
    for line in node.body:
        match line:
            case ast.Assign(targets=[ast.Name(id="code")], value=value):
                yield from _text(value)
            case (
                ast.Assign(targets=[ast.Name(id="default_error_messages")], value=ast.Dict(keys=keys))
                | ast.AnnAssign(target=ast.Name(id="default_error_messages"), value=ast.Dict(keys=keys))
            ):
                for key in keys:
                    assert key is not None
                    yield from _text(key)


def _codes_of_call(node: ast.Call) -> Iterator[str]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if ast.unparse(node.func) == "forms.ValidationError":
        return  # Of a page's form: no program sees it.
    for keyword in node.keywords:
        if keyword.arg == "code":
            yield from _text(keyword.value)
    if name in CODE_IS_FIRST and node.args:
        yield from _text(node.args[0])
    if name in CODE_IS_SECOND and len(node.args) == 3:
        yield from _text(node.args[1])


def _codes() -> dict[str, str]:
    """Every error code that our source names, and a place where it does."""
    found: dict[str, str] = {}
    for path, module in _sources():
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                codes = _codes_of_class(node)
            elif isinstance(node, ast.Call):
                codes = _codes_of_call(node)
            else:
                continue
            for code in codes:
                found.setdefault(code, f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_every_error_code_is_explained() -> None:
    codes = _codes()
    assert {
        "rate_limited",
        "unknown_field",
        "secret_collision",
        "invalid_email",
        "auth_needed",
    } <= codes.keys()
    explained = first_column(REFERENCE / "errors.md")
    missing = {code: place for code, place in codes.items() if code not in explained}
    assert missing == {}
    assert set(get_args(ErrorCode)) <= explained


def test_every_explained_error_code_is_in_the_code() -> None:
    known = {*_codes(), *get_args(ErrorCode)}
    of_the_framework = {
        "required", "null", "blank", "invalid", "not_a_list", "not_a_dict", "min_value", "max_value", "min_length",
        "max_length", "empty", "null_characters_not_allowed",
    }  # fmt: skip
    assert first_column(REFERENCE / "errors.md") - known - of_the_framework == set()


def _settings_read() -> set[str]:
    """Every environment variable that `environment.py` asks for."""
    source = (ROOT / "e2a/settings/environment.py").read_text()
    names = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        is_env = isinstance(node.func, ast.Attribute) and node.func.attr in {
            "str",
            "int",
            "bool",
            "list",
            "float",
        }
        is_ring = isinstance(node.func, ast.Name) and node.func.id == "_ring"
        argument = node.args[1 if is_ring else 0] if is_env or is_ring else None
        if isinstance(argument, ast.Constant):
            names.add(str(argument.value))
    return names


def test_every_setting_is_in_the_one_table() -> None:
    names = _settings_read()
    assert {"E2A_BIND", "E2A_VAULT_KEYS", "DATABASE_URL", "LLM_API_KEY"} <= names
    assert first_column(REFERENCE / "configuration.md") == names


def test_no_other_module_reads_the_environment() -> None:
    allowed = {"e2a/settings/environment.py", "e2a/celery.py", "e2a/management/commands/up.py", "e2a/asgi.py"}
    readers = {
        str(path.relative_to(ROOT))
        for path, module in _sources()
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert readers <= allowed


def _stored_frame_types() -> set[str]:
    """The types that `frames.py` makes: the first argument of every `Frame(…)`, and the two streams."""
    module = ast.parse(Path(str(frames.__file__)).read_text())
    calls = [node for node in ast.walk(module) if isinstance(node, ast.Call)]
    made = {
        node.args[0].value
        for node in calls
        if isinstance(node.func, ast.Name)
        and node.func.id == "Frame"
        and isinstance(node.args[0], ast.Constant)
    }
    return {str(name) for name in made} | frames.TEXT_TYPES


def _sent_frame_types(consumer: str) -> set[str]:
    """The types that the socket itself makes: every `{"type": "…"}` of the consumer that is no hint."""
    module = ast.parse((ROOT / consumer).read_text())
    return {
        str(value.value)
        for node in ast.walk(module)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "type" and isinstance(value, ast.Constant)
    }


def test_every_frame_is_explained() -> None:
    explained = first_column(REFERENCE / "frames.md")
    said = {*client_frames._FIELDS, *client_frames._LATER}
    stored, sent = _stored_frame_types(), _sent_frame_types("sessions_app/consumers.py")
    assert {"stdout", "exit", "usage", "restarted"} <= stored
    assert {"ready", "pong", "caught_up", "resync"} <= sent
    assert (said | stored | sent) - explained == set()
    of_terminal = {
        kind for kind in _sent_frame_types("sandboxes/terminal_socket.py") if not kind.startswith("terminal.")
    }
    assert {"ready", "role", "gap", "exit"} <= of_terminal
    assert (of_terminal | terminal_frames.FIELDS.keys()) - explained == set()


def test_every_word_of_a_status_is_explained() -> None:
    page = (REFERENCE / "frames.md").read_text()
    words = {*SessionStatus.values, *StopReason.values}
    assert {word for word in words if word and f"`{word}`" not in page} == set()
    page = (DOCS / "explanation/sandboxes.md").read_text()
    assert {reason for reason in DeathReason.values if f"`{reason}`" not in page} == set()


def test_every_close_code_is_explained() -> None:
    codes = {
        value
        for access in (socket_access, sandbox_access)
        for name, value in vars(access).items()
        if name.isupper() and isinstance(value, int) and 1000 <= value < 5000
    }
    assert {1012, 4401, 4410, 4429} <= codes
    page = (REFERENCE / "close-codes.md").read_text()
    explained = {
        int(code) for row in re.findall(r"^\| ([\d, ]+) \|", page, re.MULTILINE) for code in row.split(",")
    }
    assert codes - explained == set()


def test_every_command_of_ours_is_explained() -> None:
    ours = {name for name, app in get_commands().items() if str(app).partition(".")[0] in APPS}
    assert {"up", "quickstart", "gateway", "image_build"} <= ours
    assert ours - first_column(REFERENCE / "commands.md") == set()


def _pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", _pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}: there is no such heading"


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page.name != "README.md"]
    assert [page for page in pages if f"]({page})" not in index] == []


@pytest.mark.docker
def test_the_tutorials_program_runs_as_it_stands(live: LiveStack, tmp_path: Path) -> None:
    program = tmp_path / "first_agent.py"
    pieces = [
        block.text for block in blocks_of(DOCS / "tutorials/first-agent.md") if block.language == "python"
    ]
    program.write_text("\n".join(pieces))
    done = subprocess.run(
        [sys.executable, str(program)],
        env=os.environ | {"E2A": live.url, "E2A_KEY": live.api_key("tutorial@example.com")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "greeting.txt\nexit code 0\nhello\nexit code 3\n" in done.stdout
    printed = re.findall(r"^got \[(.*)\]$", done.stdout, re.MULTILINE)
    assert re.findall(r"\d", "".join(printed)) == ["1", "2", "3", "4", "5"]
    assert "line cut" in done.stdout
    assert "'status': 'ended'" in done.stdout

"""Do refusals that must look alike also take alike? `.venv/bin/python -m bench.alike` (SECURITY 1.7, 3.6, 9.8).

Starts a stack of its own on the engine `process` (no container is involved), takes each kind of call in turns, and
writes the medians and their greatest distance to bench/ALIKE.md. About two minutes.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.conditions import conditions, load_average
from bench.product import check
from bench.report import milliseconds, table
from bench.samples import Samples
from keys import formats
from tests.live import ROOT, Answer, LiveStack

OUTPUT = Path(__file__).resolve().parent / "ALIKE.md"
ROUNDS = 200
_ID_LETTERS = "abcdefghijklmnopqrstuvwxyz234567"
Call = Callable[[], Answer]

_PREPARE = """
import json, secrets
from accounts.models import Tenant, User
from e2a.core.clock import now, seconds
from accounts.services import user_get_or_create
from keys.services import key_issue, key_revoke
from keys.models import ApiKey

found = {"known": [], "disabled": []}
for number in range(%(rounds)d):
    for kind in ("known", "disabled"):
        user = user_get_or_create(address=f"{kind}-{number}@example.com")
        found[kind].append(user.email)
        if kind == "disabled":
            User.objects.filter(pk=user.pk).update(is_active=False)
def key_of(name):
    user = user_get_or_create(address=f"{name}@example.com")
    return user, key_issue(user=user, name="", scopes=None, expires_at=None)
found["live"] = [key_of("live")[1].key for _ in range(4)]
user, issued = key_of("revoked")
key_revoke(key=issued.row, actor=user)
found["revoked"] = issued.key
user, issued = key_of("expired")
ApiKey.objects.filter(pk=issued.row.pk).update(expires_at=now() - seconds(60))
found["expired"] = issued.key
user, issued = key_of("off")
User.objects.filter(pk=user.pk).update(is_active=False)
found["user disabled"] = issued.key
user, issued = key_of("suspended")
Tenant.objects.filter(pk=user.tenant_id).update(suspended_at=now())
found["tenant suspended"] = issued.key
print("FOUND" + json.dumps(found))
"""


def main() -> None:
    samples = Samples()
    facts = conditions()
    with (
        tempfile.TemporaryDirectory(prefix="e2a-alike-") as folder,
        LiveStack(Path(folder), engine="process", environment={"E2A_POOL": "standard=0"}) as stack,
    ):
        found = prepared(stack)
        groups: dict[str, Mapping[str, Call]] = {
            "login (1.7, at most 20 ms)": logins(stack, found),
            "key (3.6, at most 5 ms)": keys(stack, found),
            "foreign id (9.8, at most 20 ms)": strangers(stack, live_keys(found)),
        }
        for calls in groups.values():
            take(samples, calls)
    facts["Load average after"] = load_average()
    text = document(facts, samples, groups)
    print(text)
    OUTPUT.write_text(text)


def prepared(stack: LiveStack) -> dict[str, object]:
    """Accounts and keys of every kind, written by the product's own services."""
    done = subprocess.run(
        [sys.executable, "manage.py", "shell", "-c", _PREPARE % {"rounds": ROUNDS}],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"E2A_DATA_DIR": str(stack.data_dir), "E2A_ENGINE": "process"},
    )  # fmt: skip
    check(done.returncode == 0, done.stderr)
    found: dict[str, object] = json.loads(done.stdout.partition("FOUND")[2])
    return found


def logins(stack: LiveStack, found: Mapping[str, object]) -> dict[str, Call]:
    """An address is asked once each, since the second time within a minute is another answer."""
    numbers = {kind: iter(range(ROUNDS)) for kind in ("known", "unknown", "disabled")}

    def call(kind: str) -> Answer:
        address = f"{kind}-{next(numbers[kind])}@example.com"
        answer = stack.request("POST", "/v1/auth/login", {"email": address})
        check(answer.status == 200, answer.body)
        return answer

    return {f"login, {kind} address": lambda kind=kind: call(kind) for kind in numbers}  # type: ignore[misc]


def keys(stack: LiveStack, found: Mapping[str, object]) -> dict[str, Call]:
    live = live_keys(found)[0]
    wrong = live[: len(formats.MARKER) + formats.LOOKUP_CHARS] + "0" * 18
    kinds = {
        "unknown": formats.key_make(),
        "wrong secret": wrong + formats.checksum(wrong),
        **{name: str(found[name]) for name in ("revoked", "expired", "user disabled", "tenant suspended")},
    }
    return {f"key, {kind}": lambda key=key: refused(stack, key) for kind, key in kinds.items()}  # type: ignore[misc]


def refused(stack: LiveStack, key: str) -> Answer:
    answer = stack.request("GET", "/v1/templates", token=key)
    check(answer.status == 401, answer.body)
    return answer


def live_keys(found: Mapping[str, object]) -> list[str]:
    """Several, since one may call 600 times a minute."""
    keys = found["live"]
    assert isinstance(keys, list)
    return keys


def strangers(stack: LiveStack, mine: list[str]) -> dict[str, Call]:
    """Ids that another tenant has, against ids that nobody has."""
    turns = itertools.cycle(mine)
    theirs = stack.api_key("stranger@example.com")
    body = {"agent": {"kind": "shell"}, "user_id": "u"}
    session = stack.request("POST", "/v1/sessions", body, token=theirs).json()
    bundle = {"name": "theirs", "values": {"A_SECRET": "long enough"}}
    check(stack.request("POST", "/v1/tenants/me/secrets", bundle, token=theirs).status == 201, "bundle")
    pairs = {
        "session": ("/v1/sessions/{}", session["chat_session_id"], lambda: made_up("ses")),
        "sandbox": ("/v1/sandboxes/{}", session["sandbox_id"], lambda: made_up("sbx")),
        "bundle": ("/v1/tenants/me/secrets/{}", "theirs", lambda: f"n{random.randrange(10**5)}"),
    }

    def call(path: str) -> Answer:
        answer = stack.request("GET", path, token=next(turns))
        check(answer.status == 404, answer.body)
        return answer

    calls: dict[str, Call] = {}
    for name, (path, there, make) in pairs.items():
        calls[f"{name}, another tenant's"] = lambda path=path, there=there: call(path.format(there))  # type: ignore[misc]
        calls[f"{name}, nobody's"] = lambda path=path, make=make: call(path.format(make()))  # type: ignore[misc]
    return calls


def made_up(prefix: str) -> str:
    """An id of the right form that nobody has (e2a.core.ids)."""
    return f"{prefix}_" + "".join(random.choices(_ID_LETTERS, k=26))


def take(samples: Samples, calls: Mapping[str, Call]) -> None:
    """Every kind `ROUNDS` times, in another order each round."""
    shuffled, names = random.Random(1), list(calls)
    for _ in range(ROUNDS):
        shuffled.shuffle(names)
        for name in names:
            samples.time_call(name, calls[name])


def document(facts: Mapping[str, str], samples: Samples, groups: Mapping[str, Mapping[str, Call]]) -> str:
    summaries = samples.summaries()
    rows = [
        (name, str(found.count), *map(milliseconds, (found.p50, found.p95)))
        for name, found in summaries.items()
    ]
    distances = []
    for group, calls in groups.items():
        medians = [summaries[name].p50 for name in calls]
        distances.append((group, milliseconds(max(medians) - min(medians))))
    return (
        "\n\n".join(
            [
                "# Refusals that must look alike",
                "Written by `.venv/bin/python -m bench.alike`: kinds in turns, over HTTP, engine `process`.",
                "\n".join(f"- {name}: {value}" for name, value in facts.items()),
                table(("Greatest distance of two medians", "ms"), distances),
                table(("Milliseconds", "n", "p50", "p95"), rows),
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    main()

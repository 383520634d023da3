"""What the model broker adds to a model call: `.venv/bin/python -m bench.broker`.

Starts a stack of its own on Docker, with a sandbox and its model key, and a scripted model in a process of its own that
speaks Anthropic's Messages and writes into each chunk when it was sent. The same client calls it directly, and through
the sandbox's socket (gateway, then broker), in turns and in one run: the differences count, since both saw the same
machine. "First byte" is from the request to the first chunk, "chunk" from its sending to its arrival. Writes
bench/BROKER.md. `--quick`: one round, prints only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.conditions import conditions, load_average
from bench.product import Caller, check
from sandboxes.gateway.address import socket_path
from tests.live import LiveStack, free_port, wait_for

REPORT = Path(__file__).resolve().parent / "BROKER.md"
ROUNDS = 5
CHUNKS = 40
"""Of one answer."""
SANDBOXES = 4
"""That share the streams: one may make 32 calls at once."""
KEY = "sk-ant-a-key-of-the-bench"
_SENT = re.compile(rb'"sent": (\d+)')


@dataclass
class Load:
    """`streams` at once, each `calls` answers, whose chunks are `gap` seconds apart."""

    streams: int
    calls: int
    gap: float


LOADS = (Load(1, 30, 0.005), Load(50, 3, 0.05))


@dataclass
class Seen:
    """Milliseconds."""

    first: list[float] = field(default_factory=list)
    chunks: list[float] = field(default_factory=list)
    seconds: float = 0.0


# -- the model


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            assert length is not None
            gap = json.loads(await reader.readexactly(int(length[1])))["metadata"]["gap"]
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            start = {
                "type": "message_start",
                "message": {"model": "claude-opus-5-5", "usage": {"input_tokens": 9}},
            }
            writer.write(_event(start))
            for number in range(CHUNKS):
                if number:
                    await asyncio.sleep(gap)
                delta = {"type": "text_delta", "text": "a few words of an answer "}
                writer.write(
                    _event(
                        {
                            "type": "content_block_delta",
                            "index": 0,
                            "delta": delta,
                            "sent": time.monotonic_ns(),
                        }
                    )
                )
                await writer.drain()
            end = {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn"},
                "usage": {"output_tokens": CHUNKS},
            }
            writer.write(_event(end) + _event({"type": "message_stop"}) + b"0\r\n\r\n")
            await writer.drain()


def _event(document: Mapping[str, object]) -> bytes:
    data = f"event: {document['type']}\ndata: {json.dumps(document)}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


async def _serve(port: int) -> None:
    server = await asyncio.start_server(_answer, "127.0.0.1", port, backlog=512)
    await server.serve_forever()


@contextlib.contextmanager
def model(port: int) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", "bench.broker", "--serve", str(port)])
    try:
        yield
    finally:
        process.terminate()
        process.wait()


# -- the client


@dataclass
class Way:
    """How the model is reached: a port, or sandboxes' sockets in turn. A connection a call, in both."""

    name: str
    target: str
    port: int = 0
    paths: tuple[Path, ...] = ()
    count: int = 0

    async def opened(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if not self.paths:
            return await asyncio.open_connection("127.0.0.1", self.port)
        self.count += 1
        with socket_path(self.paths[self.count % len(self.paths)]) as name:
            return await asyncio.open_unix_connection(name)

    async def call(self, gap: float, seen: Seen) -> None:
        words = "a question of some length " * 80
        body = json.dumps(
            {
                "model": "claude-opus-5-5",
                "max_tokens": 100,
                "stream": True,
                "messages": [{"role": "user", "content": words}],
                "metadata": {"gap": gap},
            }
        ).encode()
        began = time.monotonic_ns()
        reader, writer = await self.opened()
        writer.write(
            f"POST {self.target} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"x-api-key: none\r\nanthropic-version: 2023-06-01\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        data = b""
        count = 0
        async with asyncio.timeout(60):
            while not data.endswith(b"0\r\n\r\n"):
                piece = await reader.read(65536)
                now = time.monotonic_ns()
                check(bool(piece), data[-500:])
                data += piece
                check(b"HTTP/1.1 200" in data or count, data[:500])
                *_, tail = [0, *(match.end() for match in _SENT.finditer(data))]
                for match in _SENT.finditer(data):
                    count += 1
                    if count == 1:
                        seen.first.append((now - began) / 1e6)
                    else:
                        seen.chunks.append((now - int(match[1])) / 1e6)
                data = data[tail:]
        writer.close()
        check(count == CHUNKS, count)


async def loaded(way: Way, load: Load, seen: Seen) -> None:
    async def one(number: int) -> None:
        await asyncio.sleep(number * load.gap * CHUNKS / load.streams)  # Spread: people do not ask in step.
        for _ in range(load.calls):
            await way.call(load.gap, seen)

    began = time.monotonic()
    await asyncio.gather(*(one(number) for number in range(load.streams)))
    seen.seconds += time.monotonic() - began


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p50, p95, p99."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[94], cuts[98]


def report(facts: dict[str, str], found: dict[tuple[int, str], Seen]) -> str:
    lines = ["# What the model broker adds to a model call", "", *(str(__doc__).split("\n\n")[1:]), ""]
    lines += [
        "| streams at once | | direct p50 / p95 / p99, ms | through the broker | added |",
        "|--:|---|---|---|---|",
    ]
    for load in LOADS:
        straight, through = found[load.streams, "direct"], found[load.streams, "broker"]
        for name in ("first", "chunks"):
            one, other = quantiles(getattr(straight, name)), quantiles(getattr(through, name))
            added = [b - a for a, b in zip(one, other, strict=True)]
            shown = [" / ".join(f"{value:.1f}" for value in row) for row in (one, other, added)]
            what = {"first": "first byte", "chunks": "chunk"}[name]
            lines.append(f"| {load.streams} | {what} | {shown[0]} | {shown[1]} | {shown[2]} |")
    lines += ["", "| streams at once | answers in the same time, of direct |", "|--:|--:|"]
    for load in LOADS:
        ratio = found[load.streams, "direct"].seconds / found[load.streams, "broker"].seconds
        lines.append(f"| {load.streams} | {ratio:.2f} |")
    lines += ["", *(f"- {name}: {value}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


def _runs(caller: Caller, place: str) -> bool:
    return bool(caller.call("GET", place, wants=200)["state"] == "running")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.broker")
    parser.add_argument("--quick", action="store_true", help="one round, prints only")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(_serve(options.serve))
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    rounds = 1 if options.quick else ROUNDS
    facts = conditions()
    port = free_port()
    environment = {
        "E2A_POOL": f"standard={SANDBOXES}", "E2A_ANTHROPIC_URL": f"http://127.0.0.1:{port}",
        "E2A_LLM_ALLOW_PRIVATE": f"127.0.0.1:{port}",
    }  # fmt: skip
    with (
        tempfile.TemporaryDirectory(prefix="e2a-bench-") as name,
        model(port),
        LiveStack(Path(name) / "var", environment=environment) as stack,
    ):
        caller = Caller(stack, stack.api_key())
        caller.call(
            "POST", "/v1/tenants/me/secrets", {"name": "main", "values": {"LLM_API_KEY": KEY}}, wants=201
        )
        sockets = []
        for _ in range(SANDBOXES):
            made = caller.call("POST", "/v1/sandboxes", {"secrets": ["main"]}, wants=201)
            sockets.append(stack.data_dir / "sandboxes" / made["sandbox_id"] / "host" / "egress.sock")
            place = f"/v1/sandboxes/{made['sandbox_id']}"
            wait_for(functools.partial(_runs, caller, place), what="a sandbox")
        ways = (
            Way("direct", "/v1/messages", port=port),
            Way("broker", "/llm/anthropic/v1/messages", paths=tuple(sockets)),
        )
        found = {(load.streams, way.name): Seen() for load in LOADS for way in ways}
        for way in ways:  # Imports, name look-ups and connections are made once.
            asyncio.run(loaded(way, Load(4, 2, 0.001), Seen()))
        for number in range(rounds):
            for load in LOADS:
                for way in ways:
                    asyncio.run(loaded(way, load, found[load.streams, way.name]))
            print(f"round {number + 1} of {rounds}", flush=True)
    facts["Load average after"] = load_average()
    facts["Rounds"] = f"{rounds}; {CHUNKS} chunks an answer, 5 ms apart for one stream, 50 ms for 50"
    text = report(facts, found)
    print("\n" + text)
    if not options.quick:
        REPORT.write_text(text)


if __name__ == "__main__":
    main()

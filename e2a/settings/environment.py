"""The environment, read once and typed. The only module that looks at `os.environ`.

`E2ASettings` is what the code sees, as `settings.E2A`. In development every value has a default and secrets are
made on first use in the data folder; in production (`E2A_ENV=production`) a missing secret is a system-check error.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args
from urllib.parse import parse_qsl, unquote, urlsplit

from environs import Env

from e2a.core.keyring import KeyRing, KeyRingError

Role = Literal["all", "web", "worker", "node", "gateway", "broker", "beat"]
Engine = Literal["docker", "process"]

DEFAULT_POOL_RATE = 2.0
"""Parked sandboxes a second: making one costs some 150 ms of CPU, which whoever claims may want."""
LARGEST_POOL_RATE = 100.0

_PREVIEW_URL = re.compile(r"https?://(?=[a-z0-9.-]*[a-z])[a-z0-9][a-z0-9.-]{0,189}[a-z0-9](?::[0-9]{1,5})?")

ROLES_WITH_KEYS: frozenset[str] = frozenset({"all", "web", "worker"})
ROLES_WITH_VAULT_KEYS: frozenset[str] = ROLES_WITH_KEYS | {"broker"}
ROLES_WITH_NODE_KEY: frozenset[str] = frozenset({"all", "web", "worker", "gateway", "broker"})


@dataclass(frozen=True, slots=True)
class StoragePlace:
    """Where snapshots lie: a folder, or (with a `bucket`) an S3-compatible store. Empty: the library's own default."""

    folder: str = ""
    bucket: str = ""
    prefix: str = ""
    endpoint: str = ""
    region: str = ""
    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class E2ASettings:
    """Everything e2a reads from its environment. Sizes are in the unit that the name says."""

    production: bool
    role: Role
    data_dir: Path
    public_url: str | None
    rt_url: str | None
    preview_url: str | None
    bind: str
    trusted_proxies: int
    email_url: str | None
    redis_url: str
    redis_is_own: bool
    vault_keys: KeyRing = field(repr=False)
    signing_keys: KeyRing = field(repr=False)
    node_key: bytes = field(repr=False)
    node_name: str
    node_address: str
    gateway_bind: str
    broker_bind: str
    broker_address: str
    engine: Engine
    docker_host: str | None
    docker_runtime: str
    pool: dict[str, int]
    pool_rate: dict[str, float]
    max_sandboxes: int
    disk_write_mib: int
    llm_allow_private: frozenset[str]
    egress_allow_private: frozenset[str]
    vendor_urls: dict[str, str]
    embed_origins: tuple[str, ...]
    admin_path: str
    log_format: Literal["console", "json"]
    instance: str
    storage: StoragePlace = field(default_factory=StoragePlace)
    max_snapshot_mib: int = 2048
    max_snapshots: int = 100
    max_snapshots_mib: int = 20480
    problems: tuple[tuple[str, str], ...] = ()
    """(check id, message) pairs that the system checks report: nonsense is refused, with its name."""


class _Problems:
    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []

    def add(self, check_id: str, message: str) -> None:
        self.found.append((check_id, message))


def _made_once(path: Path, value: str) -> str:
    """The text of `path`, which is made with `value` if it is missing. Many processes may call it at once."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    draft.touch(mode=0o600)
    draft.write_text(value)
    with contextlib.suppress(FileExistsError):
        os.link(draft, path)  # A link appears whole or not at all, and never replaces: the first one wins.
    draft.unlink()
    return path.read_text().strip()


def _development_secret(folder: Path, name: str) -> str:
    """32 random bytes as base64, made once in the data folder, readable by its owner only."""
    return _made_once(folder / name, base64.b64encode(secrets.token_bytes(32)).decode())


def _ring(
    env: Env, variable: str, *, wanted: bool, production: bool, folder: Path, problems: _Problems
) -> KeyRing:
    raw = env.str(variable, "")
    if not wanted:
        return KeyRing(())
    if not raw and not production:
        raw = "dev:" + _development_secret(folder, variable.lower())
    if not raw:
        problems.add(
            "e2a.E001", f"{variable} is not set. Production needs it: a list id:base64-of-32-bytes,…"
        )
        return KeyRing(())
    try:
        return KeyRing.parse(raw)
    except KeyRingError as error:
        problems.add("e2a.E002", f"{variable}: {error}")
        return KeyRing(())


def _pool(raw: str, problems: _Problems) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in filter(None, (piece.strip() for piece in raw.split(","))):
        name, _, count = part.partition("=")
        if not count.isdigit():
            problems.add("e2a.E003", f"E2A_POOL: {part!r} is not template=count")
            continue
        sizes[name] = int(count)
    return sizes


def _pool_rate(raw: str, problems: _Problems) -> dict[str, float]:
    """Parked ones a second by template; `*` is the rate of all others."""
    rates = {"*": DEFAULT_POOL_RATE}
    for part in filter(None, (piece.strip() for piece in raw.split(","))):
        name, _, number = part.rpartition("=")
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if not 0.0 < rate <= LARGEST_POOL_RATE:
            problems.add(
                "e2a.E003",
                f"E2A_POOL_RATE: {part!r} is not template=rate, above 0 and up to {LARGEST_POOL_RATE:g}",
            )
            continue
        rates[name or "*"] = rate
    return rates


def _not_negative(number: int, name: str, problems: _Problems) -> int:
    if number < 0:
        problems.add("e2a.E003", f"{name}: {number} is below 0")
    return max(0, number)


def read(base_dir: Path) -> E2ASettings:
    """Read the environment. Never raises on bad values: they become `problems`, which the checks report."""
    env = Env()
    problems = _Problems()
    production = env.str("E2A_ENV", "development") == "production"
    role = env.str("E2A_ROLE", "all")
    if role not in get_args(Role):
        problems.add("e2a.E004", f"E2A_ROLE: {role!r} is not one of {', '.join(get_args(Role))}")
        role = "all"
    engine = env.str("E2A_ENGINE", "docker")
    if engine not in get_args(Engine):
        problems.add("e2a.E005", f"E2A_ENGINE: {engine!r} is not one of {', '.join(get_args(Engine))}")
        engine = "docker"
    if production and engine == "process":
        problems.add("e2a.E006", "E2A_ENGINE=process isolates nothing; production refuses it. Use docker.")

    data_dir = Path(env.str("E2A_DATA_DIR", str(base_dir / "var"))).absolute()
    data_dir.mkdir(parents=True, exist_ok=True)
    keys_dir = data_dir / "keys"
    with_keys = role in ROLES_WITH_KEYS
    vault = _ring(
        env,
        "E2A_VAULT_KEYS",
        wanted=role in ROLES_WITH_VAULT_KEYS,
        production=production,
        folder=keys_dir,
        problems=problems,
    )
    signing = _ring(
        env, "E2A_SIGNING_KEYS", wanted=with_keys, production=production, folder=keys_dir, problems=problems
    )

    node_key = b""
    if role in ROLES_WITH_NODE_KEY:
        raw = env.str("E2A_NODE_KEY", "")
        if not raw and not production:
            raw = _development_secret(keys_dir, "e2a_node_key")
        if len(raw) < 32:
            problems.add(
                "e2a.E001", "E2A_NODE_KEY is not set or shorter than 32 characters; production needs it."
            )
        node_key = raw.encode()

    redis_url = env.str("REDIS_URL", "")
    redis_is_own = not redis_url
    if redis_is_own:
        redis_url = f"unix://{_socket_path(data_dir, 'valkey.sock')}"
    gateway_bind = env.str("E2A_GATEWAY_BIND", f"unix:{data_dir / 'run' / 'gateway.sock'}")
    broker_bind = env.str("E2A_BROKER_BIND", f"unix:{data_dir / 'run' / 'broker.sock'}")
    instance = env.str("E2A_INSTANCE", "") or _instance(data_dir)
    if production and role in ROLES_WITH_KEYS and len(env.str("SECRET_KEY", "")) < 32:
        problems.add("e2a.E001", "SECRET_KEY is not set or shorter than 32 characters; production needs it.")
    if production and not env.str("E2A_PUBLIC_URL", ""):
        problems.add(
            "e2a.E001", "E2A_PUBLIC_URL is not set. Production needs it: links in mails are built from it."
        )
    return E2ASettings(
        production=production,
        role=cast(Role, role),
        data_dir=data_dir,
        public_url=env.str("E2A_PUBLIC_URL", "").rstrip("/") or None,
        rt_url=env.str("E2A_RT_URL", "").rstrip("/") or None,
        preview_url=_preview_url(env, production, problems),
        bind=env.str("E2A_BIND", "127.0.0.1:8000"),
        trusted_proxies=env.int("TRUSTED_PROXIES", 0),
        email_url=env.str("EMAIL_URL", "") or None,
        redis_url=redis_url,
        redis_is_own=redis_is_own,
        vault_keys=vault,
        signing_keys=signing,
        node_key=node_key,
        node_name=env.str("E2A_NODE_NAME", "local"),
        node_address=env.str("E2A_NODE_ADDRESS", gateway_bind),
        gateway_bind=gateway_bind,
        broker_bind=broker_bind,
        broker_address=env.str("E2A_BROKER_ADDRESS", broker_bind),
        engine=cast(Engine, engine),
        docker_host=env.str("DOCKER_HOST", "") or None,
        docker_runtime=env.str("E2A_DOCKER_RUNTIME", "runc"),
        pool_rate=_pool_rate(env.str("E2A_POOL_RATE", ""), problems),
        pool=_pool(env.str("E2A_POOL", "standard=4"), problems),
        max_sandboxes=env.int("E2A_MAX_SANDBOXES", 100),
        disk_write_mib=_not_negative(env.int("E2A_DISK_WRITE_MIB", 200), "E2A_DISK_WRITE_MIB", problems),
        llm_allow_private=frozenset(
            filter(None, (s.strip() for s in env.str("E2A_LLM_ALLOW_PRIVATE", "").split(",")))
        ),
        egress_allow_private=frozenset(
            filter(None, (s.strip() for s in env.str("E2A_EGRESS_ALLOW_PRIVATE", "").split(",")))
        ),
        vendor_urls={
            "anthropic": env.str("E2A_ANTHROPIC_URL", "https://api.anthropic.com"),
            "openai": env.str("E2A_OPENAI_URL", "https://api.openai.com"),
            "google": env.str("E2A_GOOGLE_URL", "https://generativelanguage.googleapis.com"),
            "deepseek": env.str("E2A_DEEPSEEK_URL", "https://api.deepseek.com"),
        },
        embed_origins=tuple(filter(None, (s.strip() for s in env.str("E2A_EMBED_ORIGINS", "").split(",")))),
        admin_path=env.str("E2A_ADMIN_PATH", "").strip("/") or _admin_path(production, signing),
        log_format="json"
        if env.str("E2A_LOG_FORMAT", "json" if production else "console") == "json"
        else "console",
        instance=instance,
        storage=_storage(env, data_dir, problems),
        max_snapshot_mib=env.int("E2A_MAX_SNAPSHOT_MIB", 2048),
        max_snapshots=env.int("E2A_MAX_SNAPSHOTS", 100),
        max_snapshots_mib=env.int("E2A_MAX_SNAPSHOTS_MIB", 20480),
        problems=tuple(problems.found),
    )


def _storage(env: Env, data_dir: Path, problems: _Problems) -> StoragePlace:
    """`E2A_STORAGE_URL`: `file:///folder` or `s3://bucket/prefix?endpoint=https://host&region=name`."""
    keys = (env.str("E2A_STORAGE_ACCESS_KEY", ""), env.str("E2A_STORAGE_SECRET_KEY", ""))
    url = env.str("E2A_STORAGE_URL", "")
    default = StoragePlace(folder=str(data_dir / "snapshots"))
    if not url:
        return default
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        return StoragePlace(folder=unquote(parts.path))
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.username or parts.password:
        problems.add(
            "e2a.E007",
            "E2A_STORAGE_URL holds a key; give it as E2A_STORAGE_ACCESS_KEY and E2A_STORAGE_SECRET_KEY.",
        )
        return default
    if parts.scheme != "s3" or not parts.netloc or options.keys() - {"endpoint", "region"}:
        problems.add(
            "e2a.E007",
            "E2A_STORAGE_URL is neither file:///folder nor s3://bucket/prefix?endpoint=https://host&region=name.",
        )
        return default
    return StoragePlace(
        bucket=parts.netloc,
        prefix=unquote(parts.path).strip("/"),
        endpoint=options.get("endpoint", ""),
        region=options.get("region", ""),
        access_key=keys[0],
        secret_key=keys[1],
    )


def _preview_url(env: Env, production: bool, problems: _Problems) -> str | None:
    """The address below which each preview has a host of its own. None: there are no previews."""
    port = env.str("E2A_BIND", "127.0.0.1:8000").rpartition(":")[2]
    url = env.str("E2A_PREVIEW_URL", "" if production else f"http://localhost:{port}").rstrip("/")
    if not url:
        return None
    if not _PREVIEW_URL.fullmatch(url) or (production and not url.startswith("https:")):
        problems.add(
            "e2a.E008", f"E2A_PREVIEW_URL: {url!r} is not https://host or https://host:port, in lower case"
        )
        return None
    domain = urlsplit(url).hostname or ""
    for variable in ("E2A_PUBLIC_URL", "E2A_RT_URL"):
        host = urlsplit(env.str(variable, "")).hostname or ""
        if host.endswith(f".{domain}") and domain != "localhost":
            problems.add(
                "e2a.E008", f"E2A_PREVIEW_URL: {variable} lies below {domain}, where only previews may be"
            )
            return None
    return url


def _admin_path(production: bool, signing: KeyRing) -> str:
    """`admin` in development. In production a path that nobody guesses (SECURITY 9.12), of the oldest signing key: it
    stays while keys are added in front. `manage.py up` says it."""
    if not production or not signing.keys:
        return "admin"
    return "admin-" + signing.keys[-1].derive("admin-path").hex()[:20]


def _socket_path(data_dir: Path, name: str) -> Path:
    """A unix socket path has at most 107 bytes; a deep data folder gets a short twin below /tmp."""
    path = data_dir / "run" / name
    if len(str(path)) <= 100:
        return path
    return Path("/tmp") / f"e2a-{hashlib.sha256(str(data_dir).encode()).hexdigest()[:12]}" / name  # noqa: S108


def _instance(data_dir: Path) -> str:
    """This installation's id, the label of its containers and loops: eight lower-case hex digits."""
    return _made_once(data_dir / "instance", secrets.token_hex(4))


def django_secret_key(base_dir: Path, settings: E2ASettings) -> str:
    """`SECRET_KEY`, which signs Django's own cookies only. Made in the data folder in development."""
    value = Env().str("SECRET_KEY", "")
    if settings.role not in ROLES_WITH_KEYS:
        return secrets.token_urlsafe(48)  # Signs no cookie that anybody reads.
    if value or settings.production:
        return value
    return _development_secret(settings.data_dir / "keys", "secret_key")


def llm_api_key() -> str:
    """`LLM_API_KEY`, for `manage.py quickstart` only: the server takes model keys from secret bundles. May be empty."""
    return Env().str("LLM_API_KEY", "")


def database_url(settings: E2ASettings) -> str:
    """`DATABASE_URL`, default SQLite in the data folder."""
    return Env().str("DATABASE_URL", "") or f"sqlite:///{settings.data_dir / 'db.sqlite3'}"


def allowed_hosts(settings: E2ASettings) -> list[str]:
    """Hosts that requests may name: those of the configured addresses; loopback and the bound host in development."""
    hosts = {urlsplit(url).hostname for url in (settings.public_url, settings.rt_url) if url}
    if not settings.production:
        hosts |= {
            "localhost",
            ".localhost",
            "127.0.0.1",
            "[::1]",
            "testserver",
            settings.bind.rpartition(":")[0],
        }
    return sorted(host for host in hosts if host and host != "0.0.0.0")  # noqa: S104  (compared, not bound)


def websocket_sources(settings: E2ASettings) -> list[str]:
    """`connect-src` entries for sockets: the rt origin; in development any port of this machine."""
    if settings.rt_url:
        return [settings.rt_url.replace("http", "ws", 1)]
    if settings.public_url:
        return [settings.public_url.replace("http", "ws", 1)]
    return ["ws://localhost:*", "ws://127.0.0.1:*"]


def email(settings: E2ASettings) -> tuple[str, dict[str, object]]:
    """The mail back end and its settings, of `EMAIL_URL`: `smtp(s)://user:password@host:port`, `file:///folder`.

    Without it mail goes to files in the data folder, to the console, and to a page of the dashboard (development).
    """
    values: dict[str, object] = {"DEFAULT_FROM_EMAIL": Env().str("E2A_MAIL_FROM", "e2a <no-reply@localhost>")}
    if not settings.email_url or settings.email_url.startswith("file:"):
        folder = urlsplit(settings.email_url).path if settings.email_url else str(settings.data_dir / "mail")
        values["EMAIL_FILE_PATH"] = folder
        return "accounts.mail.FolderBackend", values
    parts = urlsplit(settings.email_url)
    values |= {
        "EMAIL_HOST": parts.hostname or "localhost",
        "EMAIL_PORT": parts.port or (465 if parts.scheme == "smtps" else 587),
        "EMAIL_HOST_USER": unquote(parts.username or ""),
        "EMAIL_HOST_PASSWORD": unquote(parts.password or ""),
        "EMAIL_USE_SSL": parts.scheme == "smtps",
        "EMAIL_USE_TLS": parts.scheme == "smtp+tls",
        "EMAIL_TIMEOUT": 20,
    }
    return "django.core.mail.backends.smtp.EmailBackend", values

"""What Docker on this host is, and whether it can hold sandboxes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.conf import settings

from e2a.core.diagnosis import Finding, fail, ok, warn
from e2a.core.errors import EngineError
from sandboxes.diagnosis.advisories import AS_OF, is_distributions, open_advisories
from sandboxes.engines.docker import DockerConnection, DockerEngine
from sandboxes.models import Template

CALL_SECONDS = 5.0
OLDEST_GOOD = (20, 10)
GOOD_DRIVERS = frozenset({"overlay2", "overlayfs", "btrfs", "zfs"})
Raw = dict[str, Any]


def engine_findings() -> Iterator[Finding]:
    """Reachable, version, storage, cgroups, runtimes, known holes, limits. Ends after the first when Docker is
    silent."""
    ours = settings.E2A
    if ours.engine == "process":
        level = fail if ours.production else warn
        yield level(
            "engine", "E2A_ENGINE=process isolates nothing", "Use Docker for anything but trying e2a."
        )
        return
    connection = DockerConnection(ours.docker_host, timeout_seconds=CALL_SECONDS)
    try:
        info: Raw = connection.run("describe itself", lambda client: client.info())
        version: Raw = connection.run("say its version", lambda client: client.version())
    except EngineError as error:
        yield fail(
            "engine",
            error.detail,
            "Start Docker, or set DOCKER_HOST. The node must be root or in its group.",
        )
        return
    yield _version(info)
    yield _storage(info)
    yield _cgroups(info)
    yield from _runtimes(info)
    yield from _holes(info, version)
    yield from _limits()


def _version(info: Raw) -> Finding:
    text = str(info["ServerVersion"])
    parts = text.split(".")
    numbers = tuple(int(part) for part in parts[:2] if part.isdigit())
    if len(numbers) == 2 and numbers < OLDEST_GOOD:
        return warn("engine", f"Docker {text}", "e2a is tried with 20.10 and later; bring Docker up to date.")
    return ok("engine", f"Docker {text} answers")


def _storage(info: Raw) -> Finding:
    driver = str(info["Driver"])
    if driver in GOOD_DRIVERS:
        return ok("storage driver", driver)
    return warn(
        "storage driver", driver, "It copies whole images or is deprecated: creates are slow. Use overlay2."
    )


def _cgroups(info: Raw) -> Finding:
    version, driver = str(info.get("CgroupVersion", "1")), str(info.get("CgroupDriver", "?"))
    seen = f"version {version}, driver {driver}"
    if driver == "none":
        return fail(
            "cgroups", seen, "Without cgroups no limit holds. Docker runs rootless on cgroup v1: use v2."
        )
    if version == "1":
        return warn(
            "cgroups",
            seen,
            "All limits hold, but systemd and runtimes give v1 up: boot with the unified hierarchy.",
        )
    return ok("cgroups", seen)


def _runtimes(info: Raw) -> Iterator[Finding]:
    known = sorted(info["Runtimes"])
    wanted = {settings.E2A.docker_runtime: "E2A_DOCKER_RUNTIME"}
    for name, runtime in (
        Template.objects.filter(is_enabled=True).exclude(runtime="").values_list("name", "runtime")
    ):
        wanted.setdefault(runtime, f"the template {name}")
    for runtime, by in sorted(wanted.items()):
        if runtime in known:
            yield ok("runtime", f"{runtime} ({by}) is known to Docker")
        else:
            yield fail(
                "runtime",
                f"{runtime} ({by}) is not known to Docker; it knows {', '.join(known)}",
                f"Install {runtime} and name it in Docker's daemon.json, or choose another. It never falls back.",
            )


def _holes(info: Raw, version: Raw) -> Iterator[Finding]:
    plugged = bool((info.get("Plugins") or {}).get("Authorization"))
    parts = {str(part["Name"]).lower(): str(part["Version"]) for part in version.get("Components") or ()}
    parts["docker"] = str(info["ServerVersion"])
    for component in ("docker", "containerd", "runc"):
        text = parts.get(component, "")
        check = f"known holes of {component}"
        if not text:
            yield warn(check, "Docker does not say its version", f"Look at `{component} --version` yourself.")
            continue
        yield holes_finding(component, text, has_authorization_plugin=plugged)


def holes_finding(component: str, version: str, *, has_authorization_plugin: bool = False) -> Finding:
    """What is known against that version. A way out of a sandbox fails, unless a distribution may have mended
    it."""
    check = f"known holes of {component}"
    found = open_advisories(component, version, has_authorization_plugin=has_authorization_plugin)
    if not found:
        return ok(check, f"{version}: none known on {AS_OF:%Y-%m-%d}")
    seen = f"{version}: " + "; ".join(f"{one.cve} ({one.what})" for one in found)
    fixed = "; ".join(sorted({" or ".join(one.fixed) for one in found}))
    if is_distributions(version):
        advice = (
            f"Mended in {fixed} and later. A distribution mends without a new number: compare the package's changelog "
            "with its security tracker, and update it."
        )
        return warn(check, seen, advice)
    advice = f"Update {component}: mended in {fixed} and later."
    return (fail if any(one.is_escape for one in found) else warn)(check, seen, advice)


def _limits() -> Iterator[Finding]:
    ours = settings.E2A
    engine = DockerEngine(
        instance=ours.instance,
        sandboxes_folder=ours.data_dir / "sandboxes",
        docker_host=ours.docker_host,
        runtime=ours.docker_runtime,
        disk_write_bytes=ours.disk_write_mib * 1024 * 1024,
    )
    soft = engine.check().soft_limits
    for sentence in soft:
        yield warn("limits", sentence, "Run the node as root on a kernel that has it, or live with it.")
    if not soft:
        yield ok("limits", "memory, swap, CPU, processes and disk of a sandbox are all enforced")

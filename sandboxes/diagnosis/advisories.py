"""Known holes of the software under every sandbox, by version. Pure; a table with a date.

Only what matters to e2a is listed: what lets a sandbox out, and what lets another user of the host in. Sources:
the projects' own security advisories (GitHub) as of `AS_OF`.
"""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass
from typing import Final

AS_OF: Final = dt.date(2026, 11, 24)

_DISTRIBUTION = re.compile(r"(dfsg|ds\d|deb\d|ubuntu|\.el\d|\.fc\d|alpine)", re.I)
_VERSION = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?:[-~](rc|beta|alpha)[.-]?(\d*))?", re.I)
_FINAL = 10_000
"""What stands in the place of a release candidate's number when it is none."""

Version = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Advisory:
    """`fixed` is the first good version of each branch that got one; older branches stay open."""

    component: str
    cve: str
    fixed: tuple[str, ...]
    what: str
    is_escape: bool = False
    """From inside a sandbox, without anybody's help outside."""
    with_authorization_plugin: bool = False
    """Concerns only daemons that have one."""


ADVISORIES: Final[tuple[Advisory, ...]] = (
    Advisory("runc", "CVE-2019-5736", ("1.0.0-rc7",), "a container overwrites runc on the host", is_escape=True),
    Advisory("runc", "CVE-2021-30465", ("1.0.0-rc95",), "mounts lead out of the container", is_escape=True),
    Advisory("runc", "CVE-2024-21626", ("1.1.12",), "a leaked descriptor leads to the host's files", is_escape=True),
    Advisory("runc", "CVE-2024-45310", ("1.1.14", "1.2.0-rc3"), "empty files can be made on the host"),
    Advisory("runc", "CVE-2025-31133", ("1.2.8", "1.3.3", "1.4.0-rc3"), "masked paths can be undone", is_escape=True),
    Advisory("runc", "CVE-2025-52565", ("1.2.8", "1.3.3", "1.4.0-rc3"), "/dev/console leads out", is_escape=True),
    Advisory("runc", "CVE-2025-52881", ("1.2.8", "1.3.3", "1.4.0-rc3"), "writes to /proc go astray", is_escape=True),
    Advisory("runc", "CVE-2026-41579", ("1.3.6", "1.4.3"), "see its advisory of June 2026"),
    Advisory("containerd", "CVE-2024-40635", ("1.6.38", "1.7.27", "2.0.4"), "a great uid becomes root"),
    Advisory("containerd", "CVE-2024-25621", ("1.7.29", "2.0.7", "2.1.5"), "its folders are open to local users"),
    Advisory("docker", "CVE-2021-41091", ("20.10.9",), "its data folder is open to local users"),
    Advisory("docker", "CVE-2022-24769", ("20.10.14",), "containers inherit capabilities"),
    Advisory("docker", "CVE-2022-36109", ("20.10.18",), "supplementary groups are not set up"),
    Advisory(
        "docker", "CVE-2024-41110", ("23.0.15", "25.0.6", "26.1.5", "27.1.1"), "authorization plugins are passed by",
        with_authorization_plugin=True,
    ),
    Advisory(
        "docker", "CVE-2026-34040", ("29.3.1",), "authorization plugins are passed by", with_authorization_plugin=True
    ),
    Advisory("docker", "CVE-2026-41567", ("29.5.1",), "copying an archive into a container runs its programs as root"),
)  # fmt: skip


def version_of(text: str) -> Version | None:
    """The numbers of a version, None when there are none. A release candidate comes before its release."""
    found = _VERSION.search(text)
    if found is None:
        return None
    major, minor, patch, stage, number = found.groups()
    return int(major), int(minor), int(patch or 0), (int(number or 0) if stage else _FINAL)


def is_distributions(text: str) -> bool:
    """Whether a distribution built it: those mend holes without changing the version."""
    return _DISTRIBUTION.search(text) is not None


def is_open(advisory: Advisory, version: Version) -> bool:
    """Whether that version has the hole, as far as its number tells."""
    fixed = [found for found in map(version_of, advisory.fixed) if found is not None]
    branch = version[:2]
    if branch > max(fixed)[:2]:
        return False
    return not any(one[:2] == branch and version >= one for one in fixed)


def open_advisories(
    component: str, version: str, *, has_authorization_plugin: bool = False
) -> list[Advisory]:
    """What is known against that version. Empty also when the version cannot be read."""
    found = version_of(version)
    if found is None:
        return []
    return [
        advisory
        for advisory in ADVISORIES
        if advisory.component == component
        and is_open(advisory, found)
        and (has_authorization_plugin or not advisory.with_authorization_plugin)
    ]

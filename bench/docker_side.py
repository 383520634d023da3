"""What the same would cost by the Docker SDK alone: `docker run` and `docker exec` with the sandbox's own image."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import docker

from bench.product import check

TRUE = ["/bin/true"]
LABEL = "e2a.bench"


class RawDocker:
    """Use as a context manager: it holds one running container for `exec`, without limits of its own."""

    def __init__(self, image: str) -> None:
        self.image = image
        self._client = docker.from_env(timeout=60)
        self._api: Any = self._client.api
        self._container: Any = None

    def __enter__(self) -> Self:
        self._container = self._client.containers.run(
            self.image,
            entrypoint=["/bin/sleep"],
            command=["infinity"],
            network_mode="none",
            labels={LABEL: "1"},
            detach=True,
            init=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._container is not None:
            self._container.remove(force=True)
        self._client.close()

    def run_true(self) -> None:
        """Create, start, wait and remove a container that runs `true`."""
        made = self._api.create_container(
            self.image,
            entrypoint=TRUE,
            host_config=self._api.create_host_config(network_mode="none"),
            labels={LABEL: "1"},
        )
        try:
            self._api.start(made["Id"])
            ended = self._api.wait(made["Id"], timeout=60)
        finally:
            self._api.remove_container(made["Id"], force=True)
        check(ended["StatusCode"] == 0, f"docker run: {ended}")

    def exec_true(self) -> None:
        """Run `true` in the container that runs already, and learn its exit code."""
        exit_code, output = self._container.exec_run(TRUE)
        check(exit_code == 0 and output == b"", f"docker exec: {exit_code} {output!r}")

    def pid_of(self, container_id: str) -> int:
        """The host's process id of a container's first process."""
        return int(self._api.inspect_container(container_id)["State"]["Pid"])

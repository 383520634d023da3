from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from e2a.core.outbound import Timeouts, outbound_client, trusted_url
from sessions_app.llm.anthropic import AnthropicModel
from tests.model_server import ModelServer

KEY = "sk-ant-planted-0123456789"

Opened = Callable[..., AnthropicModel]


@pytest.fixture
def open_client() -> Iterator[Opened]:
    """Opens clients on a model server; all are closed at the end."""
    opened: list[AnthropicModel] = []

    def open_(
        models: ModelServer, *, key: str = KEY, path: str = "", timeouts: Timeouts | None = None
    ) -> AnthropicModel:
        url = trusted_url(models.url + path)
        http = outbound_client(allow_private={url.authority}, timeouts=timeouts)
        client = AnthropicModel(api_key=key, base_url=url, http=http)
        opened.append(client)
        return client

    yield open_
    for client in opened:
        client.close()

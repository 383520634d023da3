"""What an image may be called: the grammar of Docker's references, as far as a person writes them."""

from __future__ import annotations

import re

LONGEST = 300
_NAME = re.compile(
    r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]{0,100}[a-zA-Z0-9])?(?::[0-9]{1,5})?/)?"  # host and port
    r"[a-z0-9]+(?:(?:\.|_{1,2}|-+|/)[a-z0-9]+)*"  # path
    r"(?::[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"  # tag and digest
)


def is_image_name(name: str) -> bool:
    """Whether Docker could take it for an image's name."""
    return len(name) <= LONGEST and _NAME.fullmatch(name) is not None

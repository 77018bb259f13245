"""The Hugging Face hub where nothing answers: one error at once, not a minute of attempts."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from fastrepa.errors import worded

PATIENCE = 5.0  # seconds for a connection


@contextmanager
def asking_the_hub() -> Iterator[str]:
    """Around what downloads from the hub. Gives '', or why it cannot be reached.

    What was downloaded before is then taken from the cache, as under HF_HUB_OFFLINE=1, and all
    else fails at once.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    problem = "" if before else unreachable(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = before or bool(problem)
    try:
        yield problem
    finally:
        constants.HF_HUB_OFFLINE = before


def unreachable(endpoint: str) -> str:
    """Say why nothing answers at an address; '' where something does, or a proxy is in between."""
    url = urlsplit(endpoint)
    if url.scheme in getproxies() or url.hostname is None:
        return ""
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname, port), timeout=PATIENCE).close()
    except OSError as e:
        return f"{endpoint} does not answer: {worded(e)}"
    return ""

"""This process as a user of the loopback Hub."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import datasets
import hub_server
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http, are_progress_bars_disabled, enable_progress_bars


@contextmanager
def hub_client(hub: hub_server.Hub, cache: Path) -> Iterator[hub_server.Hub]:
    """Let this process talk to an empty Hub, logged in, with an empty cache; the client's waits take no time."""
    bars, level = are_progress_bars_disabled(), logging.getLogger("huggingface_hub").level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", hub_server.WRITE_TOKEN)
        patch.setattr(_http, "time", SimpleNamespace(sleep=hub.clear().waits.append))
        yield hub
    logging.getLogger("huggingface_hub").setLevel(level)
    if not bars:
        enable_progress_bars()
    for thread in threading.enumerate():
        if thread.name == "hub-push":
            thread.join(5)

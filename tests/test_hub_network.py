"""Without a network, files in the hub's cache are read, and missing ones are reported at once."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from transformers import AutoConfig

from keygrip import hub_network
from keygrip.models.backbone import DinoBackbone
from keygrip.models.language.hub import file_of, from_pretrained, read_config, read_tokenizer


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the pauses of this process; its address of the hub refuses connections."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
    files = nobody + "/{repo_id}/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(hub_network, "_last", None)
    return pauses


def test_what_is_not_there_is_said_without_another_try(slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    for read in (read_config, read_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"maker/model .* from the hub \(http://127.* cannot be reached"):
            read("maker/model")
    assert file_of("maker/model", "config.json") is None
    monkeypatch.delenv("DINO_REPO_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match=r"cannot be reached.* not in its cache.* set backbone.weights_path"):
        DinoBackbone("dinov3_vits16plus", 64, "pretrained")
    assert slept == []


def test_what_was_downloaded_before_is_read(slept: list[float], tmp_path: Path) -> None:
    """The files are stored in the layout of the hub's cache."""
    kept, commit = tmp_path / "models--maker--model", "0" * 40
    (kept / "snapshots" / commit).mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text(commit)
    (kept / "snapshots" / commit / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 48}))
    assert from_pretrained(AutoConfig, "maker/model", cache_dir=str(tmp_path)).hidden_size == 48
    assert file_of("maker/model", "config.json", cache_dir=str(tmp_path)) is not None
    assert slept == []


def test_a_server_that_says_nothing_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:  # accepts connections and sends nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub_network, "PATIENCE_S", 0.2)
        monkeypatch.setattr(hub_network, "_last", None)
        assert "no answer" in str(hub_network.unreachable()) or "cannot be reached" in str(hub_network.unreachable())
        again = {"local_files_only": True}
        assert hub_network.cache_only_without_network("maker/model", {}) == again


@pytest.mark.parametrize("status", [200, 503])
def test_who_answers_is_within_reach(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[str] = []

    class Answering(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            requests.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(hub_network, "_last", None)
        assert hub_network.unreachable() is None
        assert hub_network.cache_only_without_network("maker/model", {}) == {}
        server.shutdown()
    assert requests == ["/"]  # the second call reads the cached answer

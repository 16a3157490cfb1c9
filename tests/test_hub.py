"""Names on the Hub, where it cannot be reached: told at once, and the cache is looked into."""

import http.server
import logging
import socket
import threading
import time

import pytest
from huggingface_hub import constants
from tiny import char_tokenizer, llama

from sysdag import DataError, SerializationError, System
from sysdag.components import Categorical, CausalLM, Diffusion
from sysdag.files import hub
from sysdag.traces.readers import read_rows


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture
def nowhere(monkeypatch):
    """An address at which nothing listens, as the Hub's."""
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_found", {})
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return address


ASKED = {
    "a system": (lambda: System.from_pretrained("nobody/nothing"), SerializationError, "no folder nobody/nothing"),
    "a model": (lambda: CausalLM("nobody/nothing").config, OSError, "config cannot be loaded"),
    "a tokenizer": (lambda: CausalLM("nobody/nothing").tokenizer, OSError, "tokenizer cannot be loaded"),
    "a classifier": (lambda: Categorical(["a", "b"], model="nobody/nothing").module, OSError, "nobody/nothing"),
    "a pipeline": (lambda: Diffusion("nobody/nothing").module, Exception, "nobody/nothing"),
    "rows": (lambda: read_rows("nobody/nothing"), DataError, "nobody/nothing cannot be loaded"),
}


@pytest.mark.parametrize("what", ASKED)
def test_what_cannot_be_reached_is_told_at_once(what, nowhere, caplog):
    call, kind, text = ASKED[what]
    started = time.monotonic()
    with caplog.at_level(logging.WARNING, "sysdag"), pytest.raises(kind, match=text):
        call()
    assert time.monotonic() - started < 10  # the libraries alone take 25 s and more
    told = [record.getMessage() for record in caplog.records if record.name == "sysdag.files.hub"]
    assert len(told) == 1
    assert told[0].startswith(f"{nowhere} cannot be reached (Connection refused): what has a name there is looked for ")
    assert constants.HF_HUB_OFFLINE is False


def test_what_is_on_this_disk_asks_nothing(tmp_path, nowhere, monkeypatch):
    llama().save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(hub, "unreachable", lambda endpoint: pytest.fail("asked"))
    component = CausalLM(tmp_path)
    assert component.module is not None
    assert component.tokenizer is not None


def test_a_hub_that_is_there_is_asked_as_ever(monkeypatch):
    """And through a proxy, where one is set: it is the proxy that has to be reached."""

    class Silent(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

    monkeypatch.setattr(hub, "_found", {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        there = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", there)
        with hub.reaching("nobody/nothing"):
            assert constants.HF_HUB_OFFLINE is False
        monkeypatch.setattr(hub, "getproxies", lambda: {"https": there})
        monkeypatch.setattr(hub, "proxy_bypass", lambda host: False)
        assert hub.unreachable("https://hub.invalid") == ""
        monkeypatch.setattr(hub, "getproxies", lambda: {"https": f"http://127.0.0.1:{free_port()}"})
        assert hub.unreachable("https://other.invalid") == "Connection refused"
        server.shutdown()
        thread.join()


def test_a_hub_that_comes_back_is_asked_again(nowhere, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(hub.time, "monotonic", lambda: now[0])
    assert hub.unreachable(nowhere) == "Connection refused"
    listener = socket.create_server(("127.0.0.1", int(nowhere.rpartition(":")[2])))
    with listener:
        assert hub.unreachable(nowhere) == "Connection refused"
        now[0] += 61
        assert hub.unreachable(nowhere) == ""

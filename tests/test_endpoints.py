"""Requests to servers: tries, waits, and whose key goes where."""

import json

import pytest
from judge_server import JudgeServer

from sysdag.endpoints.api_key import api_key_of
from sysdag.endpoints.http_client import HttpClient, Refused
from sysdag.errors import EndpointError

KEY = "sk-never-to-be-seen-0123456789"
ASKED = {"messages": [{"role": "user", "content": "hello"}]}


def ask(server, **options):
    client = HttpClient(url=server.url, **options)
    return client.request(client.at("/chat/completions"), ASKED, json.loads)


def test_a_failed_try_is_made_again_after_twice_the_wait(no_waits):
    said = iter([(500, {}, "no"), (502, {}, "no"), (429, {}, "no"), (200, {}, '{"fine": 1}')])
    with JudgeServer(lambda _: next(said)) as server:
        assert ask(server) == {"fine": 1}
    assert [0.5 * 2**n <= wait <= 2**n for n, wait in enumerate(no_waits)] == [True] * 3


def test_the_server_says_how_long_to_wait(no_waits):
    said = iter([(429, {"Retry-After": "17"}, "slow down"), (200, {}, "{}")])
    with JudgeServer(lambda _: next(said)) as server:
        ask(server)
    assert no_waits == [17.0]


@pytest.mark.parametrize(("status", "kind"), [(400, Refused), (413, Refused), (422, Refused), (404, EndpointError)])
def test_what_another_try_would_not_mend_is_not_tried_again(status, kind, no_waits):
    with JudgeServer(lambda _: (status, {}, "no such thing")) as server:
        with pytest.raises(kind, match=f"HTTP {status}.*no such thing") as error:
            ask(server)
        assert error.value.status == status
        assert len(server.requests) == 1
    assert no_waits == []


def test_a_redirect_is_an_error_since_the_key_would_follow_it(no_waits):
    away = (302, {"Location": "http://127.0.0.1:1/stolen"}, "")
    with JudgeServer(lambda _: away) as server, pytest.raises(EndpointError, match="HTTP 302"):
        ask(server, api_key=KEY)


def test_a_key_that_the_server_echoes_is_not_shown(no_waits):
    with JudgeServer(lambda _: (401, {}, f"wrong key {KEY}")) as server:
        with pytest.raises(EndpointError) as error:
            ask(server, api_key=KEY)
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(error.value)
    assert "wrong key ***" in str(error.value)


def test_without_a_named_variable_no_key_is_sent(no_waits, monkeypatch):
    for variable in ("OPENAI_API_KEY", "HF_TOKEN", "VLLM_API_KEY"):
        monkeypatch.setenv(variable, KEY)
    assert api_key_of(None, "http://127.0.0.1:8000/v1") is None
    with JudgeServer(lambda _: (200, {}, "{}")) as server:
        ask(server)
        assert KEY not in json.dumps(server.headers)


def test_the_key_comes_from_the_environment():
    assert api_key_of("MY_SERVER_KEY", "http://host/v1", {"MY_SERVER_KEY": f"{KEY}\n"}) == KEY
    with pytest.raises(EndpointError, match="variable OTHER .* is not set"):
        api_key_of("OTHER", "http://host/v1", {})


@pytest.mark.parametrize(
    ("variable", "url", "sent"),
    [
        ("OPENAI_API_KEY", "https://api.openai.com/v1", True),
        ("OPENAI_API_KEY", "https://eu.api.openai.com/v1", True),
        ("OPENAI_API_KEY", "http://127.0.0.1:8000/v1", False),
        ("OPENAI_API_KEY", "https://openai.com.evil.example/v1", False),
        ("OPENAI_API_KEY", "https://notopenai.com/v1", False),
        ("HF_TOKEN", "https://router.huggingface.co/v1", True),
        ("HF_TOKEN", "http://localhost:8000/v1", False),
    ],
)
def test_a_key_of_one_service_is_not_sent_to_another(variable, url, sent):
    environment = {variable: KEY}
    if sent:
        assert api_key_of(variable, url, environment) == KEY
        return
    with pytest.raises(EndpointError, match=f"{variable} .*which is not sent to .*variable of its own") as error:
        api_key_of(variable, url, environment)
    assert KEY not in str(error.value)

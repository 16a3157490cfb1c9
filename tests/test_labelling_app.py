import asyncio
import base64
import contextlib
import io
import json
import math
import socket
import sqlite3
import time
import urllib.request

import numpy
import pytest
from labelled_runs import Running, runs
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from sysdag.cli import app as command
from sysdag.errors import LabelError
from sysdag.labelling import server
from sysdag.labelling.app import create_app
from sysdag.labelling.guard import Access
from sysdag.labelling.session import open_labels
from sysdag.labelling.view import view_of
from sysdag.traces.cells import Draw
from sysdag.traces.readers import read_rows
from sysdag.traces.trace import Trace

HOST = "127.0.0.1:8765"
ORIGIN = f"http://{HOST}"
TOKEN, SESSION = "the-token-of-the-link", "the-secret-of-the-cookie"
COOKIE = {"cookie": f"sysdag_label_8765={SESSION}"}


@pytest.fixture
def make(tmp_path):
    stack = contextlib.ExitStack()

    def made(trace=None, **options):
        trace = trace or runs()
        store = stack.enter_context(open_labels(trace, tmp_path / "labels.sqlite", **options))
        access = Access(hosts={HOST, "localhost:8765"}, token=TOKEN, session=SESSION)
        client = TestClient(create_app(store, trace, access), base_url=ORIGIN, follow_redirects=False)
        client.store = store
        return client

    with stack:
        yield made


@pytest.fixture
def client(make):
    """A page that came in by the link."""
    client = make()
    assert client.get(f"/?token={TOKEN}").status_code == 200
    client.headers["origin"] = ORIGIN
    return client


PATHS = ["/", "/summary", "/label.js", "/page.js", "/style.css", "/api/session", "/api/summary", "/docs", "/nothing"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [{}, {"cookie": "sysdag_label_8765=wrong"}, {"cookie": f"sysdag_label_9999={SESSION}"}, {"cookie": 'a="\\'}],
    ids=["no cookie", "wrong cookie", "another port's cookie", "no cookie at all"],
)
def test_nothing_is_shown_without_the_token(make, path, headers):
    answer = make().get(path, headers=headers)
    assert answer.status_code == 403
    assert "Open that link" in answer.text
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("query", ["", "token=", "token=wrong", f"token={TOKEN}x", f"Token={TOKEN}", "token=%FF"])
def test_a_wrong_token_gives_no_cookie(make, query):
    answer = make().get(f"/?{query}")
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_the_token_is_taken_by_the_page_alone(make):
    client = make()
    assert client.get(f"/api/summary?token={TOKEN}").status_code == 403
    assert client.post(f"/?token={TOKEN}", headers={"origin": ORIGIN}).status_code == 403


def test_the_link_gives_a_cookie_that_scripts_and_other_sites_do_not_get(make):
    client = make()
    answer = client.get(f"/?token={TOKEN}&annotator=Ann")
    assert answer.headers["set-cookie"] == f"sysdag_label_8765={SESSION}; Path=/; HttpOnly; SameSite=Strict"
    assert [client.get(path).status_code for path in PATHS] == [200] * 7 + [404] * 2


@pytest.mark.parametrize("host", ["evil.example:8765", "evil.example", "127.0.0.1", "127.0.0.1:80", ""])
def test_another_host_is_refused_even_with_the_token(make, host):
    for path, headers in ((f"/?token={TOKEN}", {}), ("/api/summary", COOKIE)):
        answer = make().get(path, headers={"host": host, **headers})
        assert answer.status_code == 403
        assert "does not serve the host" in answer.text
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "http://127.0.0.1:9000", "https://127.0.0.1:8765", ORIGIN + ".evil"]
)
def test_only_its_own_pages_write(make, origin):
    headers = COOKIE | ({} if origin is None else {"origin": origin})
    answer = make().post("/api/queue", headers=headers, json={"annotator": "Ann"})
    assert answer.status_code == 403
    assert "Only pages of this server" in answer.text
    assert make().post("/api/queue", headers=COOKIE | {"origin": ORIGIN}, json={"annotator": "Ann"}).status_code == 200


def test_every_answer_forbids_what_is_not_from_here(client):
    for path in (*PATHS, f"/?token={TOKEN}x"):
        headers = client.get(path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer"


def test_pages_load_nothing_from_elsewhere(client):
    for path in ("/", "/summary", "/label.js", "/summary.js", "/page.js", "/style.css"):
        text = client.get(path).text
        assert "http://" not in text
        assert "https://" not in text
        for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", " onclick=", "style="):
            assert sink not in text


def post(client, path, **body):
    return client.post(f"/api/{path}", json=body)


def test_a_pair_shows_values_and_tells_no_run(client):
    queue = post(client, "queue", annotator="Ann").json()
    task = queue["task"]
    number = task["inputs"][0]["view"]["text"].removeprefix("question ")
    assert task["inputs"] == [{"name": "question", "view": {"kind": "text", "text": f"question {number}"}}]
    seen = set()
    for side in ("left", "right"):
        assert set(task[side]) == {"outputs", "intermediates"}
        (output,), (draft,) = task[side]["outputs"], task[side]["intermediates"]
        run = output["view"]["text"].split()[1]
        seen.add(run)
        assert output == {"name": "answer", "view": {"kind": "text", "text": f"answer {run} to {number}"}}
        assert draft == {"name": "draft", "view": {"kind": "text", "text": f"draft {run} of {number}"}}
    assert seen == {"0", "1"}
    assert set(task) == {"pair", "inputs", "left", "right"}
    assert (queue["done"], queue["total"], queue["last"]) == (0, 5, None)


def test_labels_undo_and_summary(client, tmp_path):
    first = post(client, "queue", annotator="Ann").json()
    body = {"annotator": "Ann", "pair": first["task"]["pair"], "choice": "left", "request": "request-1"}
    second = post(client, "label", **body).json()
    assert (second["done"], second["task"]["pair"] != body["pair"]) == (1, True)
    with contextlib.closing(sqlite3.connect(tmp_path / "labels.sqlite")) as other:
        assert other.execute("SELECT annotator, choice FROM labels").fetchall() == [("Ann", "left")]
    assert post(client, "label", **body).json() == second
    again = post(client, "label", **{**body, "request": "request-2"})
    assert again.status_code == 409
    assert "another tab" in again.json()["error"]
    assert client.get("/api/summary").json()["annotators"][0]["labels"] == 1
    undone = post(client, "undo", annotator="Ann", label=second["last"], request="request-3").json()
    assert undone["task"] == first["task"]
    found = client.get("/api/summary").json()
    assert (found["labelled"], found["annotators"][0]["undone"]) == (0, 1)
    assert client.get("/api/session").json() == {
        "annotators": ["Ann"], "outputs": ["answer"], "pairs": 5, "collect": "pairs",
        "choices": ["left", "right", "tie"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"choice": "best"}, {"pair": "0"}, {"pair": -1}, {"pair": 2**63}, {"pair": math.inf}, {"request": "short"},
        {"annotator": ""}, {"annotator": "\ud800"}, {"annotator": "x" * 201}, {"more": 1}, {"\udfff": 1},
    ],
)  # fmt: skip
def test_bodies_that_are_no_label(client, change):
    pair = post(client, "queue", annotator="Ann").json()["task"]["pair"]
    body = {"annotator": "Ann", "pair": pair, "choice": "left", "request": "request-1", **change}
    answer = client.post("/api/label", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("body: " if "\udfff" in change else f"body.{next(iter(change))}: ")
    assert client.get("/api/summary").json()["labelled"] == 0


def test_a_label_that_cannot_be_written_is_not_acknowledged(make):
    client = make()
    client.headers.update(COOKIE | {"origin": ORIGIN})
    pair = post(client, "queue", annotator="Ann").json()["task"]["pair"]
    client.store._database.execute("PRAGMA query_only = ON")
    answer = post(client, "label", annotator="Ann", pair=pair, choice="left", request="request-1")
    assert answer.status_code == 503
    assert "Nothing was saved" in answer.json()["error"]
    client.store._database.execute("PRAGMA query_only = OFF")
    assert post(client, "label", annotator="Ann", pair=pair, choice="left", request="request-1").json()["done"] == 1


def test_values_as_the_page_shows_them():
    image = view_of(Image.new("CMYK", (3, 2)))
    assert (image["kind"], image["width"], image["height"]) == ("image", 3, 2)
    assert image["source"].startswith("data:image/png;base64,iVBOR")
    assert view_of([{"role": "user", "content": "hi"}, None]) == {
        "kind": "list",
        "items": [
            {
                "kind": "fields",
                "items": [
                    {"name": "role", "view": {"kind": "text", "text": "user"}},
                    {"name": "content", "view": {"kind": "text", "text": "hi"}},
                ],
            },
            {"kind": "text", "text": "None"},
        ],
    }
    assert view_of("half \ud83d")["text"] == "half ?"
    assert view_of(numpy.zeros((2, 3)))["text"].startswith("array of float64, shape (2, 3)\n")
    long = view_of("x" * 300_000)["text"]
    assert len(long) < 201_000
    assert long.endswith("[cut here: 100000 more characters]")


def test_plates_and_images_are_shown_as_lists(make):
    images = [tuple(Draw(Image.new("L", (8, 8), shade + run)) for shade in (10, 200)) for run in range(2)]
    client = make(Trace({"x": [1, 1]}, {"image": images}))
    client.headers.update(COOKIE | {"origin": ORIGIN})
    view = post(client, "queue", annotator="Ann").json()["task"]["left"]["outputs"][0]["view"]
    assert [item["kind"] for item in view["items"]] == ["image", "image"]
    assert view["items"][0]["source"] != view["items"][1]["source"]


def test_images_are_shown_in_whichever_form_they_are_held():
    picture = Image.new("L", (3, 2), 90)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}]}]
    inside = view_of(messages)["items"][0]["items"][1]["view"]["items"][0]["items"][1]["view"]
    for view in (inside, view_of(buffer.getvalue()), view_of(numpy.full((2, 3), 90, numpy.uint8))):
        assert (view["kind"], view["width"], view["height"]) == ("image", 3, 2)
        decoded = Image.open(io.BytesIO(base64.b64decode(view["source"].split(",")[1])))
        assert decoded.getpixel((1, 1)) == 90


def test_a_choice_is_shown_with_its_options(make):
    one = [Draw(f"passage {run}", {"options": ["passage 0", "passage 1"], "index": run}) for run in range(2)]
    few = [Draw(["c", "a"], {"options": ["a", "b", "c"], "indices": [2, 0]})] * 2
    client = make(Trace({"x": [1, 1]}, {"one": one, "few": few, "each": [(draw, draw) for draw in one]}))
    client.headers.update(COOKIE | {"origin": ORIGIN})
    sides = post(client, "queue", annotator="Ann").json()["task"]
    seen = {part["name"]: part["view"] for kind in ("outputs", "intermediates") for part in sides["left"][kind]}
    names = [item["name"] for item in seen["one"]["items"]]
    chosen = seen["one"]["items"][0]["view"]["text"]
    marked = next(item["view"]["text"] for item in seen["one"]["items"] if item["name"].endswith("(chosen)"))
    assert (names[0], len(names), marked) == ("chosen", 3, chosen)
    names = ["chosen", "option 1 (chosen 2)", "option 2", "option 3 (chosen 1)"]
    assert [item["name"] for item in seen["few"]["items"]] == names
    assert [len(item["items"]) for item in seen["each"]["items"]] == [3, 3]


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
        ("::", False), ("192.168.0.7", False), ("example.org", False), ("localhost.example.org", False), ("", False),
    ],
)  # fmt: skip
def test_what_is_loopback(host, loopback):
    assert server.is_loopback(host) is loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", ""])
def test_other_addresses_are_refused_unless_asked_for(tmp_path, host):
    with open_labels(runs(), tmp_path / "labels.sqlite") as store, pytest.raises(LabelError, match="--allow-remote"):
        server.serve(store, runs(), host=host, browser=False)


def test_hosts_that_a_server_answers_to():
    assert server._hosts("127.0.0.1", 81) == {"127.0.0.1:81", "localhost:81", "[::1]:81"}
    assert server._hosts("Example.org", 81) == {"example.org:81"}
    assert server._hosts("Example.org", 80) == {"example.org:80", "example.org"}
    access = Access(hosts=None)
    assert access.cookie("[::1]") == access.cookie("localhost") == access.cookie("[::1]:80") == "sysdag_label_80"
    assert access.cookie("[::1]:81") == "sysdag_label_81"
    assert server._hosts("0.0.0.0", 80) is None


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as taken, open_labels(runs(), tmp_path / "labels.sqlite") as store:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LabelError, match=rf"127.0.0.1, port {port}: .*in use. --port 0 picks a free one"):
            server.serve(store, runs(), port=port, browser=False)
        with pytest.raises(LabelError, match="give an address of this machine"):
            server.serve(store, runs(), host="203.0.113.7", allow_remote=True, browser=False)


def run(*arguments):
    return CliRunner().invoke(command, ["label", *map(str, arguments)])


def test_the_command_says_what_is_wrong(tmp_path):
    traces, database = tmp_path / "runs.jsonl", tmp_path / "labels.sqlite"
    runs(each=1).save(traces)
    found = run(traces, "--database", database)
    assert (found.exit_code, "5 inputs have a single run" in found.output) == (1, True)
    assert not database.exists()
    found = run(traces, "--database", database, "--export", tmp_path / "pairs.jsonl")
    assert (found.exit_code, "There is no database" in found.output) == (1, True)
    found = run(traces, "--database", database, "--node", "nothing")
    assert (found.exit_code, "no node 'nothing'" in found.output) == (1, True)
    found = run(tmp_path / "none.jsonl", "--database", database)
    assert (found.exit_code, "none.jsonl" in found.output) == (1, True)
    runs().save(traces)
    found = run(traces, "--database", database, "--host", "0.0.0.0", "--no-browser")
    assert (found.exit_code, "--allow-remote" in found.output) == (1, True)
    found = run(traces, "--database", database, "--annotator", " ", "--no-browser")
    assert (found.exit_code, "is no name" in found.output) == (1, True)


@pytest.mark.parametrize(
    "option", [("--annotator", "Ann"), ("--port", "0"), ("--host", "localhost"), ("--allow-remote",), ("--no-browser",)]
)
@pytest.mark.parametrize("end", [("--summary",), ("--export", "pairs.jsonl")])
def test_options_of_the_page_are_refused_where_it_does_not_open(tmp_path, option, end):
    found = run(tmp_path / "runs.jsonl", *end, *option)
    assert found.exit_code == 2
    assert f"{option[0]} belongs to the page" in " ".join(found.output.replace("│", "").split())


def test_an_export_does_not_replace_what_it_is_made_of(tmp_path):
    traces, database = tmp_path / "runs.jsonl", tmp_path / "labels.sqlite.jsonl"
    runs().save(traces)
    with open_labels(runs(), database) as store:
        store.label("Ann", store.queue("Ann").task.pair, "left", "request-1")
    before = traces.read_bytes(), database.read_bytes()
    for file in (traces, tmp_path / "." / traces.name, database):
        found = run(traces, "--database", database, "--export", file)
        assert (found.exit_code, "write to another one" in found.output) == (1, True)
    assert (traces.read_bytes(), database.read_bytes()) == before
    assert run(traces, "--database", database, "--export", tmp_path / "pairs.jsonl").exit_code == 0


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = run(tmp_path / "runs.jsonl")
    assert found.exit_code == 1
    assert 'pip install "sysdag[label]"' in found.output


def label_one(client, annotator="Ann"):
    queue = post(client, "queue", annotator=annotator).json()
    pair = queue["task"]["pair"]
    body = {"annotator": annotator, "pair": pair, "choice": "left", "request": f"request-{annotator}-{pair}"}
    answer = post(client, "label", **body)
    assert answer.status_code == 200
    return body, answer.json()


def test_no_acknowledged_label_is_lost_to_kill_9(tmp_path):
    traces, database = tmp_path / "runs.jsonl", tmp_path / "labels.sqlite"
    runs().save(traces)
    given = []
    for _ in range(2):
        with Running(traces, database) as server, server.client() as client:
            for _ in range(2):
                body, after = label_one(client)
                given.append(body["pair"])
            server.process.kill()
            server.process.wait()
    with Running(traces, database) as server, server.client() as client:
        assert post(client, "label", **body).json()["done"] == 4  # a page that had no answer sends its label again
        found = client.get("/api/summary").json()
        assert (found["labelled"], found["annotators"][0]["labels"]) == (4, 4)
        queue = post(client, "queue", annotator="Ann").json()
        assert queue["task"] == after["task"]
        assert queue["task"]["pair"] not in given
        label_one(client)
        output = server.interrupt()
    assert server.process.returncode == 0
    assert "5 of 5 pairs labelled" in output
    exported = run(traces, "--database", database, "--export", tmp_path / "pairs.jsonl", "--summary")
    assert exported.exit_code == 0, exported.output
    assert "5 of 5 pairs labelled" in exported.output
    assert "5 preferences; left out: 0 ties" in exported.output
    assert len(read_rows(tmp_path / "pairs.jsonl")) == 5


def test_ctrl_c_ends_it_at_once_and_the_token_is_printed_once(tmp_path):
    traces = tmp_path / "runs.jsonl"
    runs().save(traces)
    with Running(traces, tmp_path / "labels.sqlite", "--annotator", "Ann & Bob/#") as server:
        assert server.link.endswith("&annotator=Ann%20%26%20Bob%2F%23")
        with server.client() as client:
            label_one(client)
            start = time.monotonic()
            output = server.interrupt()  # while the client still holds its connection
            assert time.monotonic() - start < 5
    assert server.process.returncode == 0
    assert "1 of 5 pairs labelled" in output
    assert "token" not in output
    assert not list(tmp_path.glob("labels.sqlite-*"))


def test_the_command_imports_no_torch():
    """It starts in a second, and labels on a machine that runs no models."""
    import subprocess
    import sys

    modules = ["commands.label", *(f"labelling.{name}" for name in ("session", "export", "summary", "server"))]
    code = f"import sys; [__import__('sysdag.' + m) for m in {json.dumps(modules)}]; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


class Endless:
    """A body of which any number of bytes can be read, and which counts those that were."""

    def __init__(self, chunk=1024):
        self.read, self.chunk = 0, chunk

    async def receive(self):
        self.read += self.chunk
        return {"type": "http.request", "body": b"x" * self.chunk, "more_body": True}


@pytest.mark.parametrize("length", [None, 10**9, 10**30])
def test_no_more_of_a_body_is_read_than_a_label_takes(client, length):
    body, sent = Endless(), []

    async def send(message):
        sent.append(message)

    headers = [(b"host", HOST.encode()), (b"origin", ORIGIN.encode()), (b"cookie", COOKIE["cookie"].encode())]
    headers += [] if length is None else [(b"content-length", str(length).encode())]
    scope = {
        "type": "http", "method": "POST", "path": "/api/label", "raw_path": b"/api/label", "query_string": b"",
        "headers": headers, "root_path": "", "scheme": "http", "http_version": "1.1",
    }  # fmt: skip
    asyncio.run(client.app(scope, body.receive, send))
    assert sent[0]["status"] == 413
    assert b"A body may have 16384 bytes" in sent[1]["body"]
    assert body.read == (0 if length else 17 * 1024)


def test_a_body_is_not_read_of_whoever_has_no_cookie(make):
    body, sent = Endless(), []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/api/label", "query_string": b"", "headers": [(b"host", b"x")]}
    asyncio.run(make().app(scope, body.receive, send))
    assert sent[0]["status"] == 403
    assert body.read == 0


def test_a_socket_and_a_large_body_are_refused_by_a_real_server(tmp_path):
    """With a cookie, and so that the server goes on serving."""
    runs().save(tmp_path / "runs.jsonl")
    with Running(tmp_path / "runs.jsonl", tmp_path / "labels.sqlite") as running:
        link = running.link
        host = link.split("/")[2]
        with urllib.request.urlopen(link) as page:
            cookie = page.headers["set-cookie"].split(";")[0]

        def asked(*lines, body=b""):
            name, port = host.split(":")
            with socket.create_connection((name, int(port)), timeout=10) as connection:
                head = [*lines, f"Host: {host}", f"Origin: http://{host}", f"Cookie: {cookie}"]
                connection.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + body)
                return connection.recv(65536).decode()

        upgrade = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
        answer = asked("GET /api/session HTTP/1.1", *upgrade, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
        assert answer.startswith(("HTTP/1.1 403 ", "HTTP/1.1 200 ")), answer  # 200 where uvicorn knows no sockets
        answer = asked("POST /api/label HTTP/1.1", "Content-Type: application/json", "Content-Length: 999999999")
        assert answer.startswith("HTTP/1.1 413 "), answer
        chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n" + b"10\r\n" + b"x" * 16 + b"\r\n"
        answer = asked("POST /api/label HTTP/1.1", "Transfer-Encoding: chunked", body=chunk)
        assert answer.startswith("HTTP/1.1 413 "), answer
        assert asked("GET /api/session HTTP/1.1", "Connection: close").startswith("HTTP/1.1 200 ")

"""Edge cases of the server, in this process: slow and large requests, other sites, keys, a busy loop, and shutdown."""

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from starlette.datastructures import Headers

from data_pipeline.tokenizers import build_tokenizer
from stlm.chat.template import ChatTemplate
from stlm.config import ModelConfig, from_dict
from stlm.errors import StlmError
from stlm.serving import (
    Access,
    Scheduler,
    Server,
    ServerLimits,
    build_app,
    checked_origins,
    listen_on,
    url_of,
)
from stlm.serving import server as server_file
from stlm.serving.protocol import RequestError
from stlm.serving.scheduler import Prompt
from stlm.stlm import STLM


@pytest.fixture
def model():
    config = {"context_length": 64, "width": 16, "core": {"num_layers": 1, "attention": {"num_heads": 2}}}
    return STLM.from_config(from_dict(ModelConfig, config), build_tokenizer("byte"), seed=1).eval()


@contextlib.contextmanager
def serving(model, access=None, limits=None):
    """Run a server in a thread, and yield its URL and the server."""
    scheduler = Scheduler(model, max_rows=4, max_waiting=40)
    ready = threading.Event()
    listener = listen_on("127.0.0.1", "0")
    app = build_app(scheduler, "tiny", limits or ServerLimits(max_tokens=100_000), ChatTemplate(), access)
    server = Server(app, scheduler, ready.set)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    assert ready.wait(60)
    try:
        yield url_of(listener), server
    finally:
        server.should_exit = True
        thread.join(60)
        scheduler.close()
        assert not thread.is_alive()


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def answer_of(connection):
    """Return the status and error message of everything sent until the server closes."""
    received = b""
    while more := connection.recv(1 << 16):
        received += more
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


def test_slow_requests_are_answered_and_closed(model, monkeypatch):
    """Endless headers, a silent connection, the second request of a connection, and a slow body."""
    monkeypatch.setattr(server_file.HTTPProtocol, "head_timeout_s", 0.5)
    with serving(model, limits=ServerLimits(body_timeout_s=0.5)) as (url, _):
        slow = [connect(url) for _ in range(20)]
        for connection in slow[1:]:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-a: b\r\n")
        second = connect(url)
        second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert second.recv(1 << 16).startswith(b"HTTP/1.1 200")
        time.sleep(0.7)  # an idle connection stays open for longer than the time limit for headers
        second.sendall(b"GET /health HTTP/1.1\r\n")
        body = connect(url)
        body.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        for connection in [*slow, second]:
            assert answer_of(connection) == (408, "the headers of the request did not arrive within 0.5 s")
        assert answer_of(body) == (408, "the body did not arrive within 0.5 s")


def test_a_large_body_is_read_before_it_is_refused(model):
    """Otherwise the connection is reset while the client still sends, and the answer is lost."""
    with serving(model, Access(api_key="k")) as (url, _):
        for path, key, status in (("v1/completions", "k", 413), ("v1/completions", "no", 401), ("v1/none", "k", 404)):
            request = urllib.request.Request(f"{url}/{path}", b" " * (8 << 20), {"Authorization": f"Bearer {key}"})
            with pytest.raises(urllib.error.HTTPError) as refused:  # urllib closes its connections after one request
                urllib.request.urlopen(request)
            assert refused.value.code == status and json.load(refused.value)["error"]["message"]
        waits = connect(url)  # the client waits for permission to send
        waits.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n"
                      b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n")  # fmt: skip
        assert waits.recv(1 << 16).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (4 << 20) + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + b"a" * 9**7,
    ],
    ids=["TLS", "no host", "long headers", "bad chunks"],
)
def test_malformed_http_is_answered(model, sent):
    with serving(model) as (url, _):
        connection = connect(url)
        connection.sendall(sent)
        status, told = answer_of(connection)
        assert status == 400 and told.startswith("Invalid HTTP request received.")


def test_encoding_a_prompt_does_not_hold_up_others(model, monkeypatch):
    """While one prompt is encoded, another client gets an answer; choices of a request share one encoding."""
    begun, answered, calls = threading.Event(), threading.Event(), []
    encode = model.tokenizer.encode

    def slow(text):
        calls.append(text)
        begun.set()
        assert answered.wait(60)
        return encode(text)

    monkeypatch.setattr(model.tokenizer, "encode", slow)
    with serving(model) as (url, _), ThreadPoolExecutor() as pool:
        asked = {"prompt": "a" * 60, "n": 16, "max_tokens": 1}
        long = pool.submit(httpx.post, f"{url}/v1/completions", json=asked, timeout=60)
        assert begun.wait(60)
        try:
            assert httpx.get(f"{url}/health", timeout=20).status_code == 200
        finally:
            answered.set()
        assert len(long.result().json()["choices"]) == 16 and calls == ["a" * 60]


def test_a_prompt_that_cannot_fit_is_not_even_encoded(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "encode", None)
    with serving(model) as (url, _):
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a" * 500_000}, timeout=60)
        assert answer.status_code == 400 and "at least 500000 ids" in answer.json()["error"]["message"]


def test_a_shutdown_is_announced_to_all_clients(model, monkeypatch):
    """On shutdown, a complete, a streamed, a waiting and a partial request each get an answer."""
    monkeypatch.setattr(server_file, "GRACE_S", 0.2)
    asked = {"prompt": "a", "max_tokens": 100_000, "n": 4, "logit_bias": {"255": -100}}
    with ThreadPoolExecutor() as pool, serving(model) as (url, server):
        post = lambda **more: httpx.post(f"{url}/v1/completions", json=asked | more, timeout=60)  # noqa: E731
        answers = [pool.submit(post), pool.submit(post, stream=True), pool.submit(post)]
        half = connect(url)
        half.sendall(b"GET /health HTTP/1.1\r\n")
        while sum(httpx.get(f"{url}/health").json()[name] for name in ("running", "waiting")) < 12:
            time.sleep(0.02)
        server.should_exit = True
        whole, stream, waiting = (answer.result() for answer in answers)
        assert answer_of(half) == (503, "the server is stopping")
    assert [whole.status_code, waiting.status_code] == [503, 503] and whole.headers["Retry-After"] == "1"
    last = json.loads(stream.text.split("\n\n")[-2].removeprefix("data: "))
    assert last["error"]["message"] == "the server is stopping"


@pytest.mark.parametrize(
    ("host", "origin", "access", "allowed"),
    [
        ("localhost:8000", None, Access(), True),
        ("LOCALHOST", None, Access(), True),
        ("127.0.0.1:1", None, Access(), True),
        ("127.9.9.9", None, Access(), True),
        ("[::1]:8000", None, Access(), True),
        ("app.localhost:8000", None, Access(), True),
        ("evil.example", None, Access(), False),
        ("evil.example:8000", "http://evil.example:8000", Access(), False),
        ("127.0.0.1.evil.example", None, Access(), False),
        ("localhost.evil.example", None, Access(), False),
        ("localhost@evil.example", None, Access(), False),
        ("192.168.0.9", None, Access(), False),
        ("", None, Access(), False),
        ("localhost:8000", "http://localhost:8000", Access(), True),
        ("localhost:8000", "http://localhost:3000", Access(), False),
        ("localhost:8000", "https://evil.example", Access(), False),
        ("localhost:8000", "null", Access(), False),
        ("localhost:8000", "null", Access(origins=("null",)), True),
        ("localhost:8000", "http://localhost:3000", Access(origins=("http://localhost:3000",)), True),
        ("localhost:8000", "https://localhost:3000", Access(origins=("http://localhost:3000",)), False),
        ("model.example", None, Access(origins=("https://model.example",)), True),
        ("localhost", "https://any.example", Access(origins=("*",)), True),
        ("model.example", None, Access(loopback=False), True),
        ("model.example", "https://evil.example", Access(loopback=False), False),
    ],
)
def test_hosts_and_origins(host, origin, access, allowed):
    headers = Headers({"host": host} | ({"origin": origin} if origin else {}))
    refused = access.refusal("/v1/completions", headers)
    assert (refused is None) == allowed and (allowed or refused.status == 403)


def test_allowed_pages_get_cors_headers(model):
    with serving(model, Access(origins=("http://localhost:3000",), api_key="k")) as (url, _):
        page, key = {"Origin": "http://localhost:3000"}, {"Authorization": "Bearer k"}
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        before = httpx.options(f"{url}/v1/completions", headers=page | asks)
        assert before.status_code == 200 and before.headers["Access-Control-Allow-Headers"] == "authorization"
        for headers, status in ((page | key, 200), (page, 401)):
            answer = httpx.get(f"{url}/v1/models", headers=headers)
            assert answer.status_code == status
            assert answer.headers["Access-Control-Allow-Origin"] == page["Origin"]
        other = httpx.post(f"{url}/v1/completions", headers={"Origin": "http://evil.example"} | key, json={})
        assert other.status_code == 403 and "Access-Control-Allow-Origin" not in other.headers
        assert other.json()["error"]["code"] == "origin_not_allowed"


def test_keys():
    access = Access(api_key="secret")
    given = {"": 401, "secret": 401, "Bearer secre": 401, "Bearer secret2": 401, "Bearer sécret": 401,
             "Basic secret": 401, "Bearer secret": None, "bearer  secret": None}  # fmt: skip
    for value, status in given.items():
        refused = access.refusal("/metrics", Headers({"authorization": value}))
        assert (refused and refused.status) == status, value
    assert access.refusal("/health", Headers({})) is None


def test_origins_are_written_as_browsers_do():
    assert checked_origins(["HTTP://localhost:3000", "*"]) == ("http://localhost:3000", "*")
    for origin in (
        "localhost:3000",
        "http://localhost:3000/",
        "http://a/b",
        "",
        "http://[::1",
        "http://a:99999",
        "http://a:8x",
    ):
        with pytest.raises(StlmError, match=r"--allow-origin: got .*, expected scheme://host:port without a path: "):
            checked_origins([origin])


def test_invalid_ports_and_hosts_are_refused():
    for port in ("99999", "-1", "abc", "", "8000.5", "²"):
        with pytest.raises(StlmError, match=r"^--port: got .*, expected 0 .any free one. to 65535"):
            listen_on("127.0.0.1", port)
    taken = listen_on("127.0.0.1", "0")
    taken.listen()
    with pytest.raises(StlmError, match="is in use; choose another"):
        listen_on("127.0.0.1", str(taken.getsockname()[1]))
    taken.close()
    for host in ("8.8.8.8", "a" * 80, "no such host"):
        with pytest.raises(StlmError, match=r"^--host: "):
            listen_on(host, "0")


def test_a_prompt_whose_scores_fail_fails_alone(model, monkeypatch):
    from stlm.generation import Sampling
    from stlm.serving import scheduler as file

    def failing(*_):
        raise MemoryError

    monkeypatch.setattr(file, "score_ids", failing)
    scheduler, told = Scheduler(model, max_rows=4, max_waiting=40), [[], []]
    done = [threading.Event(), threading.Event()]

    def tell(place, piece):
        told[place].append(piece)
        if piece.finish:
            done[place].set()

    prompts = [Prompt([255, 65], 0), Prompt([255, 65])]
    jobs = [scheduler.job(prompt, Sampling(seed=1, logit_bias=((255, -100.0),)), 5, (), lambda p, n=n: tell(n, p))
            for n, prompt in enumerate(prompts)]  # fmt: skip
    scheduler.submit(jobs)
    assert all(event.wait(60) for event in done)
    scheduler.close()
    assert [pieces[-1].finish for pieces in told] == ["error", "length"]
    assert RequestError("a", status=499).body["error"]["type"] == "server_error"

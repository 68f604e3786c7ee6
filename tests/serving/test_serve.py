"""A real server process on a tiny model: the official client, curl, many at once, and those who mean no good."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import ModelConfig, from_dict
from stlm.model.packing import IntegerProduct
from stlm.serving import ChatTemplate, Limits, Scheduler
from stlm.serving.protocol import Refused, parse_body, read_request
from stlm.stlm import STLM

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    config = {"context_length": 64, "width": 32, "core": {"num_layers": 1, "attention": {"num_heads": 2}}}
    return STLM.from_config(from_dict(ModelConfig, config), build_tokenizer("byte"), seed=1).eval()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    model.save(folder / "tiny")
    options = ["--port", "0", "--max-batch", "4", "--max-waiting", "40", "--max-tokens", "3000"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "serve.py"), str(folder / "tiny"), *options],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            break
    threading.Thread(target=process.stderr.read, daemon=True).start()
    yield f"http://127.0.0.1:{found[1]}"
    process.terminate()
    assert process.wait(20) in (0, -15)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120)


def health(server):
    return json.load(urllib.request.urlopen(f"{server}/health"))


def idle(server, seconds=30.0):
    """Whether all rows become free."""
    end = time.time() + seconds
    while time.time() < end:
        if health(server)["running"] == health(server)["waiting"] == 0:
            return True
        time.sleep(0.1)
    return False


def test_the_official_client_gets_the_text_that_the_model_writes(model, client):
    assert [one.id for one in client.models.list()] == ["tiny"]
    options = {"max_tokens": 30, "temperature": 0.9, "seed": 7}
    answer = client.completions.create(model="tiny", prompt="Some text", n=2, top_p=0.9, **options)
    alone = [
        model.generate("Some text", max_new_ids=30, temperature=0.9, top_p=0.9, seed=7 + choice) for choice in (0, 1)
    ]
    assert [choice.text for choice in answer.choices] == alone
    assert answer.usage.prompt_tokens == 9 and answer.usage.completion_tokens <= 60
    assert {choice.finish_reason for choice in answer.choices} <= {"length", "stop"}
    stop = alone[0][4:6]
    cut = client.completions.create(model="tiny", prompt="Some text", top_p=0.9, stop=[stop], **options).choices[0]
    assert (cut.text, cut.finish_reason) == (alone[0].split(stop)[0], "stop")
    pieces = list(client.completions.create(model="tiny", prompt="Some text", top_p=0.9, stream=True, **options))
    assert "".join(piece.choices[0].text for piece in pieces) == alone[0] and len(pieces) > 5
    assert pieces[-1].choices[0].finish_reason is not None


def test_a_chat_is_the_prompt_that_the_template_makes_of_it(model, client):
    messages = [{"role": "user", "content": "Hi"}]
    expected = model.generate(
        "User: Hi\nAssistant:", max_new_ids=20, temperature=0.7, seed=1, stop=["\nUser:", "\nSystem:"]
    )
    options = {"model": "tiny", "messages": messages, "max_completion_tokens": 20, "temperature": 0.7, "seed": 1}
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content == expected and answer.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage == answer.usage


def test_what_is_beside_a_request_does_not_matter(model, client):
    """Twenty clients on four rows, all with prompts, lengths and rules of their own, beyond the context too."""

    def ask(n):
        rules = {"temperature": n % 3 / 2, "seed": n}
        text = client.completions.create(model="tiny", prompt="ab" * n, max_tokens=5 * n + 1, **rules).choices[0].text
        return text == model.generate("ab" * n, max_new_ids=5 * n + 1, **rules)

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(ask, range(20)))


def test_curl(server):
    command = ["curl", "-sS", f"{server}/v1/completions", "-H", "Content-Type: application/json", "-d"]
    asked = '{"prompt": "a", "max_tokens": 5, "temperature": 0%s}'
    one = json.loads(subprocess.run([*command, asked % ""], capture_output=True, text=True, check=True).stdout)
    lines = subprocess.run([*command, asked % ', "stream": true'], capture_output=True, text=True).stdout.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(event["choices"][0]["text"] for event in events) == one["choices"][0]["text"]


def test_a_client_that_leaves_frees_its_row(server, client):
    for stream in (True, False):
        body = json.dumps({"prompt": "a", "max_tokens": 3000, "n": 4, "stream": stream}).encode()
        host, port = server.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        while not health(server)["running"]:
            time.sleep(0.02)
        connection.close()
        assert idle(server)


def test_more_than_may_wait_are_told_to_come_back(server, client):
    streams = [
        client.completions.create(model="tiny", prompt="a", max_tokens=3000, n=4, stream=True) for _ in range(11)
    ]
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(model="tiny", prompt="a", n=8)
    assert refused.value.response.headers["Retry-After"] == "1"
    for stream in streams:
        stream.close()
    assert idle(server)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", b"{", 400, "not JSON"),
        ("completions", b"[1]", 400, "expected a JSON object"),
        ("completions", b"\xff\xfe", 400, "not JSON"),
        ("completions", b"[" * 100_000, 400, "not JSON"),
        ("completions", b'{"prompt": "a", "temperature": NaN}', 400, "NaN"),
        ("completions", b'{"prompt": "' + b"a" * (1 << 20) + b'"}', 413, "at most 1,048,576 bytes"),
        ("completions", b'{"prompt": "' + b"a" * 63 + b'"}', 400, "63 ids, expected at most 62"),
        ("completions", b'{"prompt": "a", "model": "other"}', 404, "expected 'tiny'"),
        ("nothing", b"{}", 404, "Not Found"),
    ],
)
def test_a_bad_request_is_refused_in_openais_shape(server, path, body, status, message):
    request = urllib.request.Request(f"{server}/v1/{path}", body)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    error = json.load(refused.value)["error"]
    assert refused.value.code == status and message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "prompt: missing"),
        ({"prompt": 3}, "prompt: got a number"),
        ({"prompt": []}, "prompt: got a list"),
        ({"prompt": "\ud800"}, "prompt: holds a lone surrogate at character 0"),
        ({"prompt": "a", "temperature": "hot"}, "temperature: got a string, expected a number"),
        ({"prompt": "a", "temperature": True}, "temperature: got a boolean"),
        ({"prompt": "a", "temperature": 10**400}, "temperature: got inf, expected a number from 0 to 100"),
        ({"prompt": "a", "top_p": -1}, "top_p: got -1"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens: got 0, expected 1 to 1024"),
        ({"prompt": "a", "max_tokens": 10**6}, "max_tokens: got 1000000, expected 1 to 1024"),
        ({"prompt": "a", "n": 1.5}, "n: got a number, expected an integer"),
        ({"prompt": ["a"] * 9, "n": 2}, "n: got 9 prompts times 2, expected at most 16"),
        ({"prompt": "a", "stop": ["x", 1]}, "stop: got a list"),
        ({"prompt": "a", "stop": ""}, "stop: expected up to 16 strings of 1 to 256"),
        ({"prompt": "a", "stream": 1}, "stream: got a number"),
        ({"prompt": "a", "seed": "x"}, "seed: got a string"),
        ({"prompt": "a", "logprobs": 3}, "logprobs: not supported"),
        ({"prompt": "a", "temprature": 1}, "temprature: unknown; expected any of"),
        ({"messages": "hi"}, "messages: got a string"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: got null"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role: got 'king'"),
    ],
)
def test_every_field_is_checked(asked, message):
    with pytest.raises(Refused) as refused:
        read_request(asked, "messages" in asked, Limits(), ChatTemplate())
    assert message in str(refused.value) and refused.value.status == 400
    assert refused.value.body["error"]["param"] is not None


def test_the_template_of_a_tokenizer_is_used():
    template = ChatTemplate("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    asked = parse_body(b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}')
    assert read_request(asked, True, Limits(), template).prompts == ["<a>"]
    hostile = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(Refused, match="template refuses"):
        read_request(asked, True, Limits(), hostile)


def test_a_server_may_read_fewer_bits(model):
    copy = STLM.from_config(model.config, model.tokenizer, seed=1)
    scheduler = Scheduler(copy, max_rows=1, max_waiting=1, precision="int8")
    scheduler.close()
    assert isinstance(scheduler.model.head.packed, IntegerProduct)

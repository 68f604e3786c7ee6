"""A real server process on a tiny model: the official client, curl, many clients at once, and hostile requests."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import openai
import pytest
import torch

from data_pipeline.tokenizers import build_tokenizer
from stlm.chat.template import ChatTemplate
from stlm.config import ModelConfig, from_dict
from stlm.model.decoding.packed_weights import IntegerProduct
from stlm.serving import Scheduler, ServerLimits
from stlm.serving.protocol import RequestError, parse_body, parse_request
from stlm.stlm import STLM

ROOT = Path(__file__).parents[2]
HI = [{"role": "user", "content": "Hi"}]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    config = {"context_length": 64, "width": 32, "core": {"num_layers": 1, "attention": {"num_heads": 2}}}
    return STLM.from_config(from_dict(ModelConfig, config), build_tokenizer("byte"), seed=1).eval()


@pytest.fixture(scope="module")
def started(model, tmp_path_factory):
    """Start a server, and return its URL and the lines that it printed when ready."""
    folder = tmp_path_factory.mktemp("serve")
    model.save(folder / "tiny")
    options = ["--port", "0", "--max-batch", "4", "--max-waiting", "40", "--max-tokens", "3000"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "serve.py"), str(folder / "tiny"), *options],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("try"):
            break
    threading.Thread(target=process.stderr.read, daemon=True).start()
    yield re.search(r"http://127\.0\.0\.1:\d+", "".join(lines))[0], lines
    process.terminate()
    assert process.wait(20) in (0, -15)


@pytest.fixture(scope="module")
def server(started):
    return started[0]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120)


def health(server):
    return json.load(urllib.request.urlopen(f"{server}/health"))


def idle(server, seconds=30.0):
    """Return whether all rows become free in time."""
    end = time.time() + seconds
    while time.time() < end:
        if health(server)["running"] == health(server)["waiting"] == 0:
            return True
        time.sleep(0.1)
    return False


def test_the_first_lines_give_a_command_to_try(model, started):
    url, (what, where, command) = started
    about = rf"{model.num_parameters():,} parameters, tokenizer byte, context 64"
    assert re.search(rf"^model  tiny: .*/tiny, {about}$", what)
    assert where.startswith(f"URL    {url}/v1 ")
    answer = subprocess.run(command.removeprefix("try"), shell=True, capture_output=True, text=True, check=True).stdout
    assert json.loads(answer)["choices"][0]["finish_reason"] in ("length", "stop")


def test_the_official_client_gets_the_text_that_the_model_writes(model, client):
    assert [one.id for one in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
        client.models.retrieve("some/other")
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


def test_a_chat_is_completed_as_its_rendered_template(model, client):
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


def test_without_a_seed_every_answer_is_another_one(client):
    ask = {"model": "tiny", "prompt": "Some text", "max_tokens": 12}
    texts = [client.completions.create(**ask).choices[0].text for _ in range(3)]
    assert len(set(texts)) == 3
    assert len({client.completions.create(**ask, seed=0).choices[0].text for _ in range(2)}) == 1


@torch.no_grad()
def test_log_probabilities_are_those_of_the_model(model, client):
    """Both formats, prompts and generated text, any sampling settings; an id may be part of a character."""
    ask = {"model": "tiny", "temperature": 0.5, "seed": 3}
    for stream in (False, True):
        answers = client.completions.create(
            **ask, prompt=["Aé", "b"], max_tokens=9, logprobs=2, echo=True, n=2, stream=stream, logit_bias={"255": -100}
        )  # fmt: skip
        found = {}
        for answer in answers if stream else [answers]:
            for choice in answer.choices:
                text, tokens = found.setdefault(choice.index, ([], []))
                text.append(choice.text)
                places = choice.logprobs
                tokens += zip(
                    places.tokens, places.token_logprobs, places.top_logprobs, places.text_offset, strict=True
                )
        assert sorted(found) == [0, 1, 2, 3]
        for number, (pieces, tokens) in found.items():
            text, prompt = "".join(pieces), ["Aé", "b"][number // 2]
            assert text.startswith(prompt) and len(tokens) == len(prompt.encode()) + 9
            spelt = [eval(f"b'{token[6:]}'") if token.startswith("bytes:") else token.encode() for token, *_ in tokens]
            ids = [255, *b"".join(spelt)]
            assert bytes(ids[1:]).decode(errors="replace") == text
            log_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)[1:]
            for id, log_V, (token, own, top, offset) in zip(ids[1:], log_TV, tokens, strict=True):
                assert own == pytest.approx(log_V[id].item(), abs=1e-4) and top[token] == own
                assert len(top) in (2, 3) and max(top.values()) == pytest.approx(log_V.max().item(), abs=1e-4)
                assert token.startswith("bytes:") or text[offset] == token
    messages = [{"role": "user", "content": "Hi"}]
    chat = {**ask, "messages": messages, "max_tokens": 8, "logprobs": True, "top_logprobs": 1}
    content = client.chat.completions.create(**chat).choices[0].logprobs.content
    ids = [255, *b"User: Hi\nAssistant:"]
    for place in content:
        log_V = model(torch.tensor([[*ids, 0]])).logits[0, -1].log_softmax(-1)
        assert place.logprob == pytest.approx(log_V[place.bytes[0]].item(), abs=1e-4)
        assert [top.logprob for top in place.top_logprobs] == pytest.approx([log_V.max().item()], abs=1e-4)
        ids += place.bytes
    chunks = client.chat.completions.create(**chat, stream=True)
    assert [place for c in chunks if c.choices[0].logprobs for place in c.choices[0].logprobs.content] == content


def test_a_prompt_alone_may_be_scored(model, client):
    """Includes zero alternatives, no generated ids, a prompt of the whole context, and symbols as given."""
    text = "é" + "abcdefghi" * 6 + "jklmnop"
    assert len(text.encode()) == 63
    ask = {"model": "tiny", "max_tokens": 0, "logprobs": 0, "echo": True}
    whole = client.completions.create(**ask, prompt=text)
    assert whole.choices[0].text == text and whole.usage.completion_tokens == 0
    places = whole.choices[0].logprobs
    assert sum(places.token_logprobs) == pytest.approx(model.log_likelihood(text), abs=1e-3)
    assert places.top_logprobs[5] == {places.tokens[5]: places.token_logprobs[5]}
    as_ids = client.completions.create(**ask, prompt=[list(text.encode()), [255, *b"a"], [0xFC, 255, *b"a"]])
    assert as_ids.choices[0].logprobs == places and as_ids.choices[0].text == text
    for choice, front in zip(as_ids.choices[1:], (1, 2), strict=True):
        assert choice.text == "a" and choice.logprobs.token_logprobs[:front] == [None] * front
        assert choice.logprobs.token_logprobs[front] == pytest.approx(model.log_likelihood("a"), abs=1e-4)


def test_a_stop_string_and_the_end_in_log_probabilities(client):
    ask = {"model": "tiny", "prompt": "x", "max_tokens": 3, "logprobs": 1, "temperature": 0}
    held = client.completions.create(**ask, logit_bias={"97": 100}, stop=["aa"]).choices[0]
    assert (held.text, held.logprobs.tokens, held.finish_reason) == ("", [], "stop")
    ended = client.completions.create(**ask, logit_bias={"255": 100}).choices[0]
    assert (ended.text, ended.logprobs.tokens, ended.finish_reason) == ("", ["<|end_of_text|>"], "stop")


def test_ids_are_a_prompt_as_their_text_is(client):
    ask = {"model": "tiny", "max_tokens": 12, "seed": 5}
    text = client.completions.create(**ask, prompt=["Some text", "more"])
    ids = client.completions.create(**ask, prompt=[list(b"Some text"), list(b"more")])
    alone = client.completions.create(**ask, prompt=list(b"Some text"))
    assert [c.text for c in ids.choices] == [c.text for c in text.choices]
    assert alone.choices[0].text == text.choices[0].text and ids.usage == text.usage
    with pytest.raises(openai.BadRequestError, match="got id 256 at place 1, expected 0 to 255"):
        client.completions.create(**ask, prompt=[1, 256])


def test_a_bias_is_added_to_the_logit_of_an_id(model, client):
    ask = {"model": "tiny", "prompt": "x", "max_tokens": 5}
    assert client.completions.create(**ask, logit_bias={"97": 100}).choices[0].text == "aaaaa"
    greedy = client.completions.create(**ask, temperature=0).choices[0].text
    banned = {str(byte): -100 for byte in greedy.encode()[:1]}
    assert client.completions.create(**ask, temperature=0, logit_bias=banned).choices[0].text != greedy
    assert model.generate("x", max_new_ids=5, logit_bias=((97, 100.0),)) == "aaaaa"
    with pytest.raises(openai.BadRequestError, match="logit_bias: got id 256"):
        client.completions.create(**ask, logit_bias={"256": 1})


def test_metrics_are_in_the_format_of_prometheus(server):
    from prometheus_client.parser import text_string_to_metric_families

    answer = urllib.request.urlopen(f"{server}/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    assert families["stlm_requests"].type == "counter" and families["stlm_texts_running"].type == "gauge"
    assert {"stlm_prompt_ids", "stlm_answer_seconds", "stlm_first_piece_seconds"} <= families.keys()


def test_concurrent_requests_do_not_affect_each_other(model, client):
    """Twenty clients on four rows, each with its own prompt, length and rules, and beyond the context too."""

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


def metric(server, name):
    text = urllib.request.urlopen(f"{server}/metrics").read().decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("more", [b"", b"GET /health"], ids=["", "after half of another request"])
def test_a_client_that_leaves_frees_its_rows_at_once(server, client, stream, more):
    """Four texts that cannot end, and four that wait: few of 24,000 ids are generated, and no text is completed."""
    drawn, ended = metric(server, "stlm_completion_ids_total"), metric(server, "stlm_texts_total")
    asked = {"prompt": "a", "max_tokens": 3000, "n": 8, "stream": stream, "logit_bias": {"255": -100}}
    body = json.dumps(asked).encode()
    host, port = server.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body + more)
    end = time.time() + 60
    while not health(server)["running"] and time.time() < end:
        time.sleep(0.02)
    assert health(server)["running"] == 4
    connection.close()
    assert idle(server)
    assert metric(server, "stlm_completion_ids_total") - drawn < 12_000
    assert metric(server, "stlm_texts_total") == ended


def test_requests_beyond_the_queue_are_told_to_retry(server, client):
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
        ("completions", b'{"prompt": "a", "\\ud800": 1}', 400, "surrogate"),
        ("completions", b'{"prompt": "a", "user": "\\udfff"}', 400, "user: holds a lone surrogate"),
        ("completions", b'{"prompt": "a", "metadata": {"\xed\xa0\x80": []}}', 400, "metadata: holds a lone surrogate"),
        ("chat/completions", b'{"messages": [{"role": "\\ud800", "content": ""}]}', 400, "messages: holds a lone"),
        ("completions", b'{"prompt": "a", "stop": ["b\\ud800"]}', 400, "stop: holds a lone surrogate at character 1"),
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
        ({"prompt": "a", "logprobs": 21}, "logprobs: got 21, expected 0 to 20"),
        ({"prompt": "a", "logprobs": True}, "logprobs: got a boolean, expected an integer"),
        ({"prompt": [1, "a"]}, "prompt: got a list whose item 0 is a number"),
        ({"prompt": []}, "prompt: got an empty list, expected a string"),
        ({"prompt": [[1], [True]]}, "prompt: got a list whose item 1 is a list"),
        ({"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias: got 'a', expected an id"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias.1: got 101, expected a number from -100 to 100"),
        ({"prompt": "a", "logit_bias": [1]}, "logit_bias: got a list"),
        ({"prompt": "a", "top_k": -2}, "top_k: got -2"),
        ({"prompt": "a", "best_of": 3}, "best_of: only supported where it equals n"),
        ({"prompt": "a", "suffix": "x"}, "suffix: not supported"),
        ({"prompt": "a", "ignore_eos": True}, "ignore_eos: not supported"),
        ({"prompt": "a", "user": 3}, "user: got a number"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options: only valid with stream=true"),
        ({"prompt": "a", "stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation: not"),
        ({"messages": HI, "logprobs": 1}, "logprobs: got a number, expected true or false"),
        ({"messages": HI, "top_logprobs": 1}, "top_logprobs: only valid with logprobs=true"),
        ({"messages": HI, "response_format": {"type": "json_object"}}, "response_format: not supported"),
        ({"messages": HI, "tools": [{"type": "function"}]}, "tools: not supported"),
        ({"messages": HI, "tool_choice": "required"}, "tool_choice: not supported"),
        ({"messages": HI, "echo": True}, "echo: not supported"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0]: tool calls"),
        ({"prompt": "a", "temprature": 1}, "temprature: unknown; expected any of"),
        ({"messages": "hi"}, "messages: got a string"),
        ({"messages": []}, "messages: got an empty list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]}, "content[0].type: got 'im"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: got null"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role: got 'king'"),
    ],
)
def test_every_field_is_checked(asked, message):
    with pytest.raises(RequestError) as refused:
        parse_request(asked, "messages" in asked, ServerLimits(), ChatTemplate())
    assert message in str(refused.value) and refused.value.status == 400
    assert refused.value.body["error"]["param"] is not None


@pytest.mark.parametrize("asked", [{"prompt": "a"}, {"messages": HI}], ids=["completion", "chat"])
def test_fields_without_effect_are_accepted(asked):
    nothing = {
        "response_format": {"type": "text"}, "tool_choice": "none", "tools": [], "functions": [],
        "function_call": "none", "parallel_tool_calls": True, "top_k": -1, "logit_bias": {}, "n": 1, "store": False,
        "metadata": {}, "service_tier": "auto", "modalities": ["text"], "suffix": "", "echo": False, "best_of": 1,
        "logprobs": False, "top_logprobs": 0, "user": "me", "prompt_cache_key": "x", "stream": False, "stop": [],
        "stream_options": {"include_usage": False}, "repetition_penalty": 1, "min_tokens": 0,
        "reasoning_effort": "none",
    }  # fmt: skip
    names = [*nothing, "seed", "max_tokens", "audio", "prediction", "web_search_options", "guided_json", "temperature"]
    for more in (nothing, dict.fromkeys(names), {"top_k": 0}):
        both = asked, asked | more
        plain, found = (parse_request(one, "messages" in asked, ServerLimits(), ChatTemplate()) for one in both)
        assert replace(found, sampling=replace(found.sampling, seed=plain.sampling.seed)) == plain


def test_the_template_of_a_tokenizer_is_used():
    template = ChatTemplate("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    asked = parse_body(b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}')
    assert parse_request(asked, True, ServerLimits(), template).prompts == ["<a>"]
    hostile = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RequestError, match="rejected by the model"):
        parse_request(asked, True, ServerLimits(), hostile)


def test_a_server_can_use_a_lower_precision(model):
    copy = STLM.from_config(model.config, model.tokenizer, seed=1)
    scheduler = Scheduler(copy, max_rows=1, max_waiting=1, precision="int8")
    scheduler.close()
    assert isinstance(scheduler.model.head.packed, IntegerProduct)

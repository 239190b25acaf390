"""OpenAI's routes: what they answer is what the model says, and what they refuse they name."""

import contextlib
import json
import socket
import threading

import pytest

from lora_jax.models import generate_text
from lora_jax.serve import Engine
from tests.serve.answers import SIZES, assert_idle, prompt
from tests.serve.conftest import NAMES
from tests.serve.over_http import KEY, chat, client_of, completion, pieces, refused, until

IDS = list(prompt(0, 12))


@pytest.fixture(scope="module")
def client(shared_engine, pretrained, adapters):
    folders = {name: adapters.folder / name for name in NAMES}
    with client_of(shared_engine, pretrained, folders, base_name="tiny", max_tokens=64) as made:
        yield made
    until(lambda: not (shared_engine.stats.running or shared_engine.stats.waiting))
    assert_idle(shared_engine)


@pytest.fixture(scope="module")
def adapter_client(shared_engine, pretrained, adapters):
    """Of a server whose clients may load adapters, and need a key."""
    options = dict(adapter_root=adapters.folder, api_keys=("another", KEY), max_body=4096)
    with client_of(shared_engine, pretrained, {}, **options) as made:
        made.headers["authorization"] = f"Bearer {KEY}"
        yield made


def test_models_are_the_base_and_its_adapters(client):
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["tiny", *NAMES]
    assert [card["parent"] for card in cards] == [None, "tiny", "tiny", "tiny"]
    assert client.get("/v1/models/a").json() == cards[1]
    assert client.get("/health").json() == {"status": "ok"}


def test_a_completion_is_what_generate_says(client, pretrained, adapters):
    alone = (pretrained.module, pretrained.params, pretrained.tokenizer)
    [expected] = generate_text(*alone, [IDS], max_new_tokens=8, logprobs=2)
    body = completion(client, IDS, model="tiny", logprobs=2).json()
    [choice] = body["choices"]
    assert choice["text"] == expected.text
    assert choice["finish_reason"] == expected.finish_reason == "length"
    told = choice["logprobs"]
    assert told["token_logprobs"] == pytest.approx([p.logprob for p in expected.logprobs], abs=1e-4)
    assert "".join(told["tokens"]) == pretrained.tokenizer.decode(expected.tokens, special=True)
    assert [len(top) for top in told["top_logprobs"]] == [2] * 8
    assert body["usage"]["prompt_tokens"] == 12 and body["usage"]["completion_tokens"] == 8
    other = completion(client, IDS, model="a").json()["choices"][0]["text"]
    assert other != choice["text"]


@pytest.mark.parametrize("model", ["tiny", "b"])
def test_pieces_are_the_whole(client, model):
    options = dict(model=model, n=2, logprobs=1, temperature=1, seed=3)
    whole = completion(client, [IDS, IDS[:5]], **options).json()
    told = pieces(
        completion(
            client, [IDS, IDS[:5]], **options, stream=True, stream_options={"include_usage": True}
        )
    )
    *told, last = told
    assert last["choices"] == [] and last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    for choice in whole["choices"]:
        own = [p["choices"][0] for p in told if p["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert [piece["finish_reason"] for piece in own][-1] == choice["finish_reason"]
        assert {piece["finish_reason"] for piece in own[:-1]} <= {None}
        logprobs = [p for piece in own for p in piece["logprobs"]["token_logprobs"]]
        assert logprobs == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-4)
        offsets = [at for piece in own for at in piece["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]
        for token, top in zip(
            *map(choice["logprobs"].get, ("tokens", "top_logprobs")), strict=True
        ):
            assert token in top  # drawn, and so not always the likeliest
    assert len({choice["text"] for choice in whole["choices"]}) == 4


def test_a_conversation_is_answered(client, pretrained):
    whole = chat(client, "one two", logprobs=True, top_logprobs=1).json()
    assert whole["object"] == "chat.completion" and whole["id"].startswith("chatcmpl-")
    [choice] = whole["choices"]
    assert choice["message"]["role"] == "assistant"
    for token in choice["logprobs"]["content"]:
        assert token["top_logprobs"][0]["token"] == token["token"]  # greedy
    told = pieces(chat(client, "one two", stream=True))
    assert told[0]["choices"][0]["delta"]["role"] == "assistant"
    deltas = [piece["choices"][0]["delta"].get("content", "") for piece in told]
    assert "".join(deltas) == choice["message"]["content"]
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}]
    body = {"messages": messages, "temperature": 0, "max_completion_tokens": 8}
    again = client.post("/v1/chat/completions", json=body).json()
    assert again["choices"][0]["message"] == choice["message"]
    # An empty answer is part of a conversation too.
    for said in ({"content": ""}, {"content": None}, {}):
        turns = [messages[0], {"role": "assistant", **said}, messages[0]]
        assert client.post("/v1/chat/completions", json=body | {"messages": turns}).is_success


def test_stops_end_an_answer_and_echo_begins_it(client):
    text = completion(client, "one two three").json()["choices"][0]["text"]
    stop = text[2:4]
    [choice] = completion(client, "one two three", stop=[stop]).json()["choices"]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
    [choice] = completion(client, "one two three", echo=True).json()["choices"]
    assert choice["text"] == "one two three" + text


def test_a_share_that_underflows_leaves_the_likeliest_token(client):
    greedy = completion(client, IDS).json()["choices"][0]["text"]
    for share in (1e-38, 1e-45, 1e-300):
        sampled = completion(client, IDS, temperature=2, top_p=share).json()
        assert sampled["choices"][0]["text"] == greedy


def test_one_seed_says_one_thing(client):
    said = [completion(client, IDS, temperature=1.5, seed=s).json() for s in (1, 1, -2)]
    texts = [body["choices"][0]["text"] for body in said]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "fields, status, param",
    [
        (dict(prompt=5), 400, "prompt"),
        (dict(prompt=[]), 400, "prompt"),
        (dict(), 400, None),
        (dict(prompt="x", temperature=5), 400, "temperature"),
        (dict(prompt="x", temperature="hot"), 400, "temperature"),
        (dict(prompt="x", temprature=1), 400, "temprature"),
        (dict(prompt="x", stop=[""]), 400, "stop"),
        (dict(prompt="x", max_tokens=0), 400, "max_tokens"),
        (dict(prompt="x", max_tokens=65), 400, "max_tokens"),
        (dict(prompt="x", top_p=0), 400, "top_p"),
        (dict(prompt="x", suffix="y"), 400, "suffix"),
        (dict(prompt="x", best_of=2), 400, "best_of"),
        (dict(prompt="x", n=37), 400, "n"),
        (dict(prompt=["x"] * 37), 400, "n"),
        (dict(prompt="x" * 10_000), 400, "prompt"),
        (dict(prompt=[[1]] * 3000), 400, None),
        (dict(prompt="x", logit_bias={"5": 1}), 400, "logit_bias"),
        (dict(prompt="x", echo=True, logprobs=1), 422, "echo"),
        (dict(prompt=[100_000]), 400, "prompt"),
        (dict(prompt=[3] * 97), 400, "prompt"),
        (dict(prompt=[3] * 90, max_tokens=7), 400, "prompt"),
        (dict(prompt="x", model="d"), 404, "model"),
    ],
)
def test_what_cannot_be_answered_is_named(client, fields, status, param):
    error = refused(client.post("/v1/completions", json=fields), status)
    assert error["param"] == param


@pytest.mark.parametrize(
    "fields, status, param",
    [
        (dict(messages=[]), 400, "messages"),
        (dict(messages=[{"content": "x"}]), 400, "messages"),
        (dict(messages=[{"role": "king", "content": "x"}]), 400, "messages"),
        (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages"),
        (dict(messages=[{"role": "user"}]), 400, "messages"),
        (dict(tools=[{"type": "function"}]), 400, "tools"),
        (dict(response_format={"type": "json_object"}), 400, "response_format"),
        (dict(top_logprobs=3), 400, "top_logprobs"),
    ],
)
def test_conversations_that_cannot_be_answered_are_named(client, fields, status, param):
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    assert refused(client.post("/v1/chat/completions", json=body), status)["param"] == param


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[1]", b"\xff\xfe", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}',
        b'{"prompt":' + b"[" * 100_000, b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": [' + b"9" * 5000 + b"]}", b'{"prompt": "\xed\xa0\x80"}',
        '{"prompt": "\\ud800"}'.encode("utf-16"), b'{"prompt":' + b"[" * 400 + b"]" * 400 + b"}",
    ],
)  # fmt: skip
def test_a_body_that_is_not_json_is_refused(client, raw):
    kind = {"content-type": "application/json"}
    refused(client.post("/v1/completions", content=raw, headers=kind), 400)


def test_other_kinds_of_bodies_routes_and_pages_are_refused(client):
    refused(client.post("/v1/completions", content=b"{}"), 415)
    refused(client.get("/v1/completions"), 405)
    refused(client.get("/v1/nothing"), 404)
    refused(client.get("/v1/models/d"), 404)
    refused(client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "a"}), 404)
    refused(client.get("/v1/models", headers={"origin": "http://elsewhere.example"}), 403)
    refused(client.get("/v1/models", headers={"sec-fetch-site": "cross-site"}), 403)
    refused(client.get("/v1/models", headers={"origin": "http://["}), 403)
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=followed).is_success
    here = str(client.base_url).rstrip("/")
    assert client.get("/v1/models", headers={"origin": here}).is_success


def test_every_route_but_health_needs_the_key(adapter_client):
    routes = ["/", "/chat.js", "/v1/models", "/metrics", "/openapi.json", "/nothing", "//health"]
    for route in routes:
        keys = ("", f"Bearer {KEY}x", "Bearer", f"Token {KEY}", "Basic !", "Basic é", "Bearer é")
        for key in keys:
            found = adapter_client.get(route, headers={"authorization": key.encode("latin-1")})
            assert refused(found, 401)["code"] == "invalid_api_key"
    assert adapter_client.get("/health", headers={"authorization": ""}).is_success
    assert adapter_client.get("/v1/models").is_success
    page = adapter_client.get("/", headers={"authorization": "", "accept": "text/html"})
    assert page.headers["www-authenticate"].startswith("Basic")
    assert adapter_client.get("/", auth=("anybody", KEY)).is_success


def test_too_large_a_body_is_refused(adapter_client):
    refused(completion(adapter_client, "x" * 5000), 413)
    parts = iter([b'{"prompt": "', b"x" * 5000, b'"}'])  # without a length
    kind = {"content-type": "application/json"}
    refused(adapter_client.post("/v1/completions", content=parts, headers=kind), 413)


def change(client, action, name, path=None, **fields):
    body = {"lora_name": name, **({} if path is None else {"lora_path": path}), **fields}
    return client.post(f"/v1/{action}_lora_adapter", json=body)


def test_adapters_come_and_go(adapter_client, client):
    assert change(adapter_client, "load", "late", "c").text.startswith("Success")
    said = completion(adapter_client, IDS, model="late").json()["choices"][0]["text"]
    assert said == completion(client, IDS, model="c").json()["choices"][0]["text"]
    refused(change(adapter_client, "load", "late", "a"), 400)
    assert change(adapter_client, "load", "late", "a", load_inplace=True).is_success
    other = completion(adapter_client, IDS, model="late").json()["choices"][0]["text"]
    assert other == completion(client, IDS, model="a").json()["choices"][0]["text"] != said
    assert change(adapter_client, "unload", "late").is_success
    refused(change(adapter_client, "unload", "late"), 404)
    refused(completion(adapter_client, IDS, model="late"), 404)
    refused(change(adapter_client, "unload", "base"), 400)


def test_what_is_loaded_lies_below_the_root_and_fits(adapter_client, adapters, tmp_path):
    root = adapters.folder
    (tmp_path / "outside").mkdir()
    link, made = root / "link", root / "odd"
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "outside")
    made.mkdir(exist_ok=True)
    (root / "circle").unlink(missing_ok=True)
    (root / "circle").symlink_to("circle")
    for path in ("..", "a/../..", str(tmp_path), "link", "/etc", "x\0y", "."):
        error = refused(change(adapter_client, "load", "x", path), 400)
        assert error["param"] == "lora_path"
    for path in ("missing", "circle", "n" * 300):
        refused(change(adapter_client, "load", "x", path), 404)
    (made / "adapter_config.json").write_text((root / "a/adapter_config.json").read_text())
    for name, content in (("adapter_model.bin", b"\x80"), ("adapter_model.safetensors", b"x" * 9)):
        (made / name).write_bytes(content)
        error = refused(change(adapter_client, "load", "x", "odd"), 422)
        assert str(root) not in json.dumps(error) and "x" in error["message"]
    (made / "adapter_model.safetensors").unlink()
    (made / "adapter_model.safetensors").symlink_to("/etc/hostname")
    refused(change(adapter_client, "load", "x", "odd"), 400)
    assert change(adapter_client, "load", "x", str(root / "b")).is_success
    assert change(adapter_client, "unload", "x").is_success


def test_a_client_that_hangs_up_frees_its_row(client, shared_engine):
    host, port = client.base_url.host, client.base_url.port
    for stream in (True, False):
        fields = dict(prompt=IDS, max_tokens=64, stop_token_ids=[], ignore_eos=True, stream=stream)
        body = json.dumps(fields | {"n": 4}).encode()
        before = shared_engine.stats.new_tokens
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection((host, port)) as line:
            line.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
            until(lambda before=before: shared_engine.stats.new_tokens > before)
        until(lambda: not (shared_engine.stats.running or shared_engine.stats.waiting))
        assert shared_engine.stats.new_tokens - before < 4 * 64
    # Every choice is counted, and nobody was there to be answered.
    until(lambda: 'ending="cancelled",model="tiny"} 8.0' in client.get("/metrics").text)
    assert 'http_responses_total{code="503"}' not in client.get("/metrics").text


def test_too_many_calls_are_told_to_wait(pretrained):
    sizes = SIZES | dict(max_rows=1, max_waiting=1, adapter_slots=0)
    with Engine(pretrained, **sizes) as engine, contextlib.ExitStack() as stack:
        client = stack.enter_context(client_of(engine, pretrained, {}, timeout=0.5))
        long = dict(max_tokens=80, ignore_eos=True, n=1)
        hold = threading.Event()
        # The row is held up, so that no machine is too fast for this.
        token = Engine._write_tokens
        engine._write_tokens = lambda: hold.wait() and token(engine)
        found = []
        calls = [
            threading.Thread(target=lambda: found.append(completion(client, IDS, **long)))
            for _ in range(2)
        ]
        for call in calls:
            call.start()
            until(lambda: engine.stats.running)
        until(lambda: engine.stats.waiting)
        answer = completion(client, IDS)
        assert refused(answer, 429)["type"] == "rate_limit_error"
        assert answer.headers["retry-after"]
        threading.Timer(0.6, hold.set).start()
        for call in calls:
            call.join()
        for late in found:  # both took longer than they may
            assert refused(late, 503)["code"] == "timeout"
            assert late.headers["x-should-retry"] == "false"
        engine.close()
        refused(completion(client, IDS), 503)
        assert client.get("/health").status_code == 503


def test_a_server_answers_to_its_own_names(shared_engine, pretrained):
    with client_of(shared_engine, pretrained, {}, hosts=("127.0.0.1", "here.example")) as client:
        for host in ("127.0.0.1", "127.0.0.1:99", "here.example"):
            assert client.get("/v1/models", headers={"host": host}).is_success
        for host in ("elsewhere.example", "here.example.elsewhere", ""):
            refused(client.get("/v1/models", headers={"host": host}), 403)


def test_metrics_tell_what_was_done(client):
    assert completion(client, IDS, model="b").is_success
    text = client.get("/metrics").text
    assert 'lora_jax_requests_total{ending="length",model="b"}' in text
    assert 'lora_jax_time_to_first_token_seconds_count{model="b"}' in text
    assert "lora_jax_requests_running 0.0" in text and "lora_jax_rows 4.0" in text
    assert "process_resident_memory_bytes" in text

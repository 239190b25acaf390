"""A server from its command to its end."""

import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import jax
import pytest

from lora_jax import InputError
from lora_jax.cli import main
from lora_jax.serve import ServerSettings, read_api_keys, room_for, serve
from tests.serve.over_http import completion, until

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--adapter", "a=missing"], "missing"),
        (["--adapter", "{a}", "--adapter", "{a}"], "the name 'a' is taken"),
        (["--api-key-file", "missing"], "missing: cannot read the API keys"),
        (["--adapter-root", "missing"], "adapter_root missing is not a directory"),
        (["--port", "70000"], "--port 70000: cannot listen there"),
        (["--port", "{port}"], "cannot listen there: Address already in use"),
        (["--host", "nowhere.invalid"], "--host nowhere.invalid"),
        (["--max-rows", "0", "--port", "0"], "max_rows must be at least 1"),
        (["--max-body", "0"], "max_body must be at least 1"),
        (["--timeout", "nan"], "timeout must be above 0"),
        (["--template", "chatmk", "--port", "0", "--max-rows", "1"], "did you mean 'chatml'"),
        (["--lora.r", "8"], "of the config's keys, only --model.key, --quant.key"),
    ],
)
def test_what_does_not_fit_gets_one_line(base_dir, adapters, capsys, words, said):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        known = dict(a=adapters.folder / "a", port=taken.getsockname()[1])
        words = [word.format_map(known) for word in words]
        with pytest.raises(SystemExit) as stop:
            main(["serve", str(base_dir), "--max-length", "32", *words])
    assert stop.value.code == 2
    *notes, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
    assert set(notes) <= {"loading the model and compiling its programs"}


def test_a_long_context_is_not_held_for_every_row(pretrained, monkeypatch):
    monkeypatch.setattr("lora_jax.serve._server._LENGTH", 32)
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    said = []
    serve(lambda: pretrained, port=0, say=said.append, max_rows=1, prefill_chunk=16)
    assert "at most 32 tokens, where the model was made for 128" in said[1]
    assert said[2].startswith("serving base at http://127.0.0.1:")


def test_no_room_on_the_device_gets_one_line(pretrained, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB wanted\nat line 3")

    monkeypatch.setattr("lora_jax.serve._engine.ContinuousBatch", full)
    with pytest.raises(
        InputError, match="no room: RESOURCE_EXHAUSTED: 9 GB wanted; lower max_rows"
    ):
        serve(lambda: pretrained, port=0, say=lambda line: None)


def test_room_is_made_for_the_adapters_that_are_known(adapters, tmp_path):
    known = {name: adapters.folder / name for name in ("a", "b")}
    sizes = room_for(known, ServerSettings())
    assert sizes["adapter_slots"] == 2 and sizes["max_rank"] == 8 and not sizes["use_dora"]
    later = room_for(known, ServerSettings(adapter_root=tmp_path))
    assert later["adapter_slots"] == 8 and later["max_rank"] == 16


@pytest.mark.parametrize("text", ["", "\n \n", "two words", "schlüssel", "a\x01b"])
def test_keys_that_no_header_can_hold_are_refused(tmp_path, text):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(InputError, match="key"):
        read_api_keys(file)
    file.write_text(" first \n\nsecond\n")
    assert read_api_keys(file) == ("first", "second")
    assert "first" not in repr(ServerSettings(api_keys=read_api_keys(file)))


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_what_is_in_flight_end(base_dir, adapters, number, code):
    words = ["serve", base_dir, "--adapter", f"a={adapters.folder / 'a'}", "--port", "0"]
    command = [sys.executable, "-m", "lora_jax", *map(str, words), "--max-rows", "1"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = ""
        while " at http" not in line:
            line = process.stderr.readline()
            assert process.poll() is None
        with httpx2.Client(base_url=line.split(" at ")[1].split()[0], timeout=60) as client:
            options = dict(max_tokens=100, ignore_eos=True, model="a", stream=True, n=16)
            answers = []

            def ask() -> None:
                answers.append(completion(client, [5, 6, 7], **options))

            calls = [threading.Thread(target=ask) for _ in range(3)]
            for call in calls:
                call.start()
            until(lambda: "lora_jax_requests_running 1.0" in client.get("/metrics").text)
            process.send_signal(number)
            for call in calls:
                call.join()
            for answer in answers:
                *_, last, done = [line for line in answer.text.split("\n\n") if line]
                assert done == "data: [DONE]"
                chunk = json.loads(last.removeprefix("data: "))
                assert chunk["choices"][0]["finish_reason"] == "length"
            assert process.wait(timeout=60) == code
            with pytest.raises(httpx2.ConnectError):
                client.get("/health")
        assert process.stderr.read().splitlines()[-1] == "stopped"

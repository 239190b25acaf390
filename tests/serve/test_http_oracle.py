"""Other people's clients: OpenAI's own, and schemathesis, which reads our description."""

import pytest

from tests.serve.answers import prompt
from tests.serve.conftest import NAMES
from tests.serve.over_http import KEY, client_of

openai = pytest.importorskip("openai")
schemathesis = pytest.importorskip("schemathesis")

pytestmark = pytest.mark.oracle
HELLO = [{"role": "user", "content": "one two three"}]
FEW = dict(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def http(shared_engine, pretrained, adapters):
    folders = {name: adapters.folder / name for name in NAMES}
    settings = dict(base_name="tiny", api_keys=(KEY,), adapter_root=adapters.folder, timeout=20.0)
    with client_of(shared_engine, pretrained, folders, **settings) as made:
        yield made


@pytest.fixture(scope="module")
def client(http):
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_openai_s_client_reads_models_texts_and_conversations(client):
    assert [model.id for model in client.models.list()] == ["tiny", *NAMES]
    assert client.models.retrieve("a").id == "a"
    text = client.completions.create(model="tiny", prompt=list(prompt(0, 9)), logprobs=1, **FEW)
    assert text.usage.completion_tokens == len(text.choices[0].logprobs.tokens) == 8
    for model in ("tiny", "a"):
        said = client.chat.completions.create(model=model, messages=HELLO, logprobs=True, **FEW)
        [choice] = said.choices
        assert choice.finish_reason == "length" and len(choice.logprobs.content) == 8
        options = dict(stream=True, stream_options={"include_usage": True})
        pieces = list(client.chat.completions.create(model=model, messages=HELLO, **FEW, **options))
        told = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
        assert "".join(told) == choice.message.content
        assert pieces[-1].usage.completion_tokens == 8


def test_openai_s_client_raises_what_went_wrong(client):
    chat = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="no model 'd'"):
        chat(model="d", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(model="a", messages=HELLO, temperature=7)
    with pytest.raises(openai.BadRequestError, match="there is room for") as long:
        chat(model="a", messages=[{"role": "user", "content": "one " * 200}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_an_asynchronous_client_may_leave(client, shared_engine):
    stream = client.completions.create(
        model="b", prompt="one", stream=True, max_tokens=80, temperature=0
    )
    next(iter(stream))
    stream.close()


def test_every_route_keeps_its_description(http):
    """Bodies made from the description, and from its opposite: never a failure of the server."""
    config = schemathesis.Config.from_dict(
        {
            "headers": {"Authorization": f"Bearer {KEY}"},
            # What fits no schema is refused all the same: a prompt too long for its answer, say.
            "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "4xx"]}},
        }
    )
    schema = schemathesis.openapi.from_url(
        f"{http.base_url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}, config=config
    )
    tried = 0
    for operation in schema.get_all_operations():
        tried += check(operation.ok())
    assert tried > 50


def check(operation) -> int:
    import hypothesis

    count = 0

    @hypothesis.settings(
        max_examples=12, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(case=operation.as_strategy())
    def call(case):
        nonlocal count
        count += 1
        case.call_and_validate()

    call()
    return count

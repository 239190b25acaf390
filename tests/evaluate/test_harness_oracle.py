"""lm-evaluation-harness over our model, against its own model over transformers and PEFT."""

import dataclasses

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

from lora_jax.evaluate import TextModel, harness_model  # noqa: E402
from lora_jax.models import load_pretrained  # noqa: E402
from lora_jax.train import with_adapter  # noqa: E402

pytestmark = pytest.mark.oracle

STORY = "Once upon a time, there was a little girl named Lily. She liked to play in the park. "
CONTEXTS = ["Once upon a time", "Lily and Tom went to the ", "", STORY * 14, "The big dog"]
ENDINGS = [", there was a little girl", "park.", " xylophone"]


@dataclasses.dataclass
class Request:
    args: tuple
    task_name: str = "test"


@pytest.fixture(scope="module")
def both(data_dir):
    """(ours, theirs) of a real small Llama with an adapter that PEFT trained."""
    from lm_eval.models.huggingface import HFLM  # type: ignore
    from peft import PeftModel

    directory = data_dir / "stories260K-hf"
    adapter = str(data_dir / "peft_made" / "stories260K-hf__lora_r8_all")
    pretrained = load_pretrained(directory)
    ours = TextModel.of(pretrained, with_adapter(pretrained, adapter))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(directory), dtype="float32")
    model = PeftModel.from_pretrained(model, adapter)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(directory))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")
    return harness_model(ours, batch_size=3), theirs


def test_continuations_and_whole_texts(both):
    ours, theirs = both
    assert ours.max_length == theirs.max_length and ours.prefix_token_id == theirs.prefix_token_id
    pairs = [Request((context, ending)) for context in CONTEXTS for ending in ENDINGS]
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    found = ours.loglikelihood(pairs, disable_tqdm=True)
    assert [total for total, _ in found] == pytest.approx([t for t, _ in expected], rel=2e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({greedy for _, greedy in found}) == 2  # both kinds are there
    texts = [Request((text,)) for text in (STORY, STORY * 20)]
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, rel=2e-5)


def test_texts_up_to_stops(both):
    ours, theirs = both
    options = {"until": [".", "girl"], "max_gen_toks": 12, "do_sample": False}
    requests = [
        Request((context, dict(options))) for context in CONTEXTS if len(context) in range(1, 99)
    ]
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert ours.generate_until(requests) == expected and any(expected)

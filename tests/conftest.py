"""What every test runs under, and what many of them share: a tiny base and rows to train it on."""

import contextlib
import fcntl
import gc
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Set before JAX is imported, and inherited by the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
# Tests compile thousands of programs that run once or twice: LLVM's optimizations and the MLIR
# pipeline of fused loops cost more than they save, and what was compiled once is worth keeping.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
FLAGS = ["--xla_backend_optimization_level=0"]
if version("jax").startswith("0.10."):  # later ones refuse a flag that they no longer know
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
for flag in FLAGS:
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
# Where each operation was written is for profilers to read.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# bitsandbytes would have a C++ compiler make what it computes once.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping  # noqa: E402

# An int is a float, as every type checker but plain beartype has it.
jaxtyping.install_import_hook(
    "lora_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from tokenizers import Tokenizer as Backend  # noqa: E402
from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: E402

from lora_jax.models import CausalLM, ModelConfig, save_pretrained  # noqa: E402

# Tracing makes objects by the hundred thousand; going through them all takes longer than that.
gc.set_threshold(100_000, 50, 100)
# Examples are the same in each run, so that nothing depends on luck; --all looks for new ones.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("new", deadline=None)

CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
MOST_MAPPINGS = 30_000
QUICKSTART = [
    "--train.steps=2", "--train.batch_size=2", "--data.max_length=128", "--data.train_rows=24",
    "--data.eval_rows=6",
]  # fmt: skip
"""What makes the quickstart small."""
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("new" if config.getoption("--all") else "same")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    skip = pytest.mark.skip(reason="slow; run with --all")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Programs are let go before they fill the process: each takes some of its memory mappings.

    Linux allows 65,530, and a compiler that gets no more of them crashes.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of models and data made by others, named by LORA_JAX_TEST_DATA."""
    name = os.environ.get("LORA_JAX_TEST_DATA")
    if not name:
        pytest.skip("needs outside data: set LORA_JAX_TEST_DATA to their folder")
    folder = Path(name)
    if not folder.is_dir():
        pytest.fail(f"LORA_JAX_TEST_DATA={name} is not a folder")
    return folder


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer, in Hugging Face layout."""
    directory = tmp_path_factory.mktemp("base") / "base"
    shapes = CausalLM(CONFIG).init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    save_pretrained(directory, shapes, CONFIG, dtype="float32")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS), "Say hello.", "### Response:"], trainer)
    backend.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return directory


def row(i: int) -> dict[str, str]:
    return {"prompt": f"{WORDS[i % 10]} {i}", "completion": " ".join(WORDS[: 1 + i % 4])}


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(40)))
    return path


@pytest.fixture(scope="session")
def quickstart_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small quickstart, made once for all processes that test.

    It ran beside `quickstart/`, which was taken; `said.txt` beside it is what it printed.
    """
    from lora_jax.cli import main

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    taken, said = shared / "quickstart", shared / "said.txt"
    with (shared / "quickstart.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            taken.mkdir()
            (taken / "kept.txt").write_text("of an earlier run")
            with said.with_suffix(".part").open("w") as file, contextlib.redirect_stdout(file):
                main(["quickstart", "--output", str(taken), *QUICKSTART])
            said.with_suffix(".part").rename(said)
    return shared / "quickstart-2"

"""A run's YAML file: read, refused, written back."""

import pytest

from lora_jax import QuantConfig
from lora_jax.train import config_text, load_config

SMALLEST = "data: {train: rows.jsonl}\noutput: runs/x\n"


@pytest.fixture
def load(tmp_path):
    def read(text, *words):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(path, list(words))

    return read


def test_resolved_config_reads_back(load):
    config = load(
        SMALLEST + "quant: {}\nlora: {r: 2, target_modules: [q_proj], rank_pattern: {q_proj: 3}}\n"
        "train: {learning_rate: 1e-4, patience: 2, eval_every: 5}\n"
    )
    assert config.quant == QuantConfig() and config.train.learning_rate == 1e-4
    assert load(config_text(config)) == config


@pytest.mark.parametrize("text", ["", "quant: null\n", "quant:\n"])
def test_without_quant_weights_stay_dense(load, text):
    config = load(SMALLEST + text)
    assert config.quant is None and load(config_text(config)) == config


def test_words_win_over_the_file(load):
    config = load(SMALLEST, "--lora.r", "4", "--train.learning_rate=3e-4", "--quant", "{}")
    assert (config.lora.r, config.train.learning_rate) == (4, 3e-4)
    assert config.quant == QuantConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train: {learning_rat: 1}",
            "train.learning_rat: unknown key (did you mean 'learning_rate",
        ),
        ("trian: {}", "trian: unknown key (did you mean 'train'?)"),
        ("train: {steps: 1.5}", "train.steps: expected a whole number, got 1.5"),
        ("train: {steps: 0}", "train.steps: must be at least 1, got 0"),
        ("train: {samples: -1}", "train.samples: must be at least 0, got -1"),
        ("train: {learning_rate: 0}", "train.learning_rate: must be a number above 0, got 0"),
        ("train: {learning_rate: .inf}", "train.learning_rate: must be a number above 0, got inf"),
        ("train: {learning_rate: .nan}", "train.learning_rate: must be a number above 0, got nan"),
        ("train: {epochs: -1}", "train.epochs: must be a number above 0"),
        ("train: {warmup: 3}", "train.warmup: must be at least 0 and below 1, got 3"),
        ("train: {beta2: 1}", "train.beta2: must be at least 0 and below 1"),
        ("train: {weight_decay: -1}", "train.weight_decay: must be at least 0"),
        ("train: {clip_norm: 0}", "train.clip_norm: must be a number above 0, got 0"),
        ("train: {steps: 100000000000}", "train.steps: more than 2^31 steps"),
        ("train: {adapter: 2024-02-30}", "not YAML: day is out of range for month"),
        ("train: {seed: -1}", "train.seed: must be from 0 to 2^63 - 1, got -1"),
        ("train: {patience: 2}", "train.patience: needs train.eval_every"),
        (
            "train: {method: qlora}",
            "train.method: got 'qlora' (did you mean 'lora'?); use lora, full",
        ),
        ("train: {optimizer: lora_puls}", "got 'lora_puls' (did you mean 'lora_plus'?)"),
        ("train: {lora_plus_ratio: 0}", "train.lora_plus_ratio: must be a number above 0, got 0"),
        (
            "train: {lora_plus_ratio: 2}",
            "train.lora_plus_ratio: goes with optimizer lora_plus, got",
        ),
        (
            "train: {optimizer: lora_fa, riemannian_damping: 1}",
            "train.riemannian_damping: goes with optimizer riemannian, got lora_fa",
        ),
        (
            "train: {optimizer: lora_fa, method: full}",
            "train.optimizer: lora_fa goes with method lora, whose factors it scales; use adamw",
        ),
        ("train: {method: full}\nquant: {}", "quant: full training needs dense weights"),
        ("train: {method: full, adapter: a}", "train.adapter: goes with method lora"),
        ("model: {dtype: float8}", "model.dtype: got 'float8'"),
        ("model: {remat: some}", "model.remat: got 'some'; use everything, nothing, dots"),
        ("quant: {format: nf5}", "quant.format: got 'nf5' (did you mean 'nf4'?)"),
        (
            "quant: {block_size: 16}",
            "quant: block_size must be an even number from 32 to 4096, got 16",
        ),
        ("lora: {use_qalora: true}", "lora: use_qalora=True is not supported"),
        ("lora: {lora_alhpa: 3}", "lora: unknown field 'lora_alhpa' (did you mean 'lora_alpha'?)"),
        ("lora: {adapter_dtype: int8}", "lora: adapter_dtype='int8' is not supported"),
        ("lora: {lora_dropout: 1.5}", "lora: lora_dropout must be in [0, 1)"),
        ("lora: 3", "lora: must be a section of `key: value` lines, got 3"),
    ],
)
def test_refuses(load, message_of, text, message):
    assert message in message_of(load, f"{SMALLEST}{text}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: x\n", "run.yaml: data is missing"),
        ("output: x\ndata: {}\n", "run.yaml: data.train is missing"),
        ("data: {train: a}\n", "run.yaml: output is missing"),
        ("output: x\ndata: {train: a, max_length: 1}\n", "data.max_length: must be at least 2"),
        ("output: x\ndata: {train: a, eval_share: 0}\n", "data.eval_share: must be above 0"),
        ("output: x\ndata: {train: a, eval_rows: 0}\n", "data.eval_rows: must be at least 1"),
        ("output: x\ndata: {train: a, format: alpca}\n", "data.format: got 'alpca' (did you mean"),
        ("- a\n", "run.yaml: must hold sections"),
        ("", "run.yaml: must hold sections"),
        ("a: [", "not YAML"),
    ],
)
def test_refuses_the_whole_file(load, message_of, text, message):
    assert message in message_of(load, text)


def test_unreadable_files(message_of, tmp_path):
    assert "cannot read: No such file" in message_of(load_config, tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a text in UTF-8" in message_of(load_config, tmp_path / "bytes.yaml")


def test_misspelt_flag_names_the_nearest(load, message_of):
    found = message_of(load, SMALLEST, "--learning-rate", "3")
    assert "learning-rate: unknown key (did you mean 'train.learning_rate'?)" in found

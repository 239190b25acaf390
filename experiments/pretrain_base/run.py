"""Pretrain the bundled base on the source code and documentation of the running Python.

Prints and draws the loss; leaves the model in Hugging Face layout.  The processor time is
fixed, not the number of steps: the learning rate follows the share of `--cpu-minutes` that the
process has used, so a run may be stopped and continued by signals, or share its machine.

    python experiments/pretrain_base/run.py --cpu-minutes 80 --output runs/pretrain_base
    python experiments/pretrain_base/run.py --start DIR --cpu-minutes 80 --output DIR

`--start` goes on from the model and the history that an earlier leg left in its `--output`.
    python experiments/pretrain_base/run.py --sample "def read_text(path):" --output DIR
"""

import argparse
import json
import platform
import re
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lora_jax.data._stdlib import docstring_rows, is_held_out, stdlib_modules
from lora_jax.models import CausalLM, ModelConfig

END, PAD = "<|endoftext|>", "<|pad|>"
TOKENS_PER_STEP = 4096
PHASES = ((0.0, 256), (0.7, 512))
"""(share of the time from which it holds, sequence length): short sequences first."""
EVAL_SEQUENCES = 64

CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=1,
)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE, so that every text has an encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=CONFIG.vocab_size,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def test_sources() -> list[str]:
    """The standard library's tests, where they are installed, without the held-out modules'.

    A file is left out that is named after a held-out module or quotes one of its docstrings.
    """
    held_out = {name.partition(".")[0] for name, _ in stdlib_modules() if is_held_out(name)}
    named = re.compile(rf"(^|_)({'|'.join(map(re.escape, held_out))})(_|$)")
    quoted = [row["output"] for row in docstring_rows(held_out=True, max_source=10**6)]
    sources = []
    for path in sorted((Path(sysconfig.get_paths()["stdlib"]) / "test").rglob("*.py")):
        source = path.read_text("utf-8", errors="replace")
        of_held_out = any(named.search(part) for part in (path.stem, path.parent.name))
        quotes = any(sentence in source for sentence in quoted)
        if not (of_held_out or quotes or "\ufffd" in source):
            sources.append(source)
    return sources


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one row of ids, each preceded by the end-of-text token."""
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([end, *e.ids], np.uint16) for e in encoded])


def init_params(model: CausalLM, key: jax.Array) -> dict:
    """Normal(0.02), output projections scaled down by sqrt(2·layers) (GPT-2's rule)."""
    params = model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]

    def leaf(path, value):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.ones_like(value)
        std = 0.02
        if "o_proj" in name or "down_proj" in name:
            std /= (2 * CONFIG.num_hidden_layers) ** 0.5
        return std * jax.random.normal(jax.random.fold_in(key, hash_name(name)), value.shape)

    return jax.tree_util.tree_map_with_path(leaf, params)


def hash_name(name: str) -> int:
    return int.from_bytes(name.encode(), "little") % (2**31)


def muon_axes(params: dict) -> dict:
    """Matrices of the stacked layers go to Muon, embedding and norms to Adam."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: MuonDimensionNumbers(1, 2) if x.ndim == 3 else None, params
    )


def optimizer(params: dict, peak: float) -> optax.GradientTransformation:
    @optax.inject_hyperparams
    def build(scale):
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            muon(
                peak * scale,
                weight_decay=0.1,
                consistent_rms=0.2,
                adam_b2=0.98,
                muon_weight_dimension_numbers=muon_axes(params),
            ),
        )

    return build(scale=0.0)


def learning_rate_scale(share: float, hold: float) -> float:
    """Warm up for 2 % of the time, stay up to the share `hold`, then fall linearly to 0."""
    return min(share / 0.02, 1.0, max((1.0 - share) / (1.0 - hold), 0.0))


def read_history(directory: Path) -> list[dict]:
    lines = (directory / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def make_steps(model: CausalLM, tx: optax.GradientTransformation):
    def loss_fn(params, ids):
        logits = model.apply({"params": params}, ids[:, :-1])
        picked = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)

    @jax.jit
    def train_step(params, state, ids):
        loss, grads = jax.value_and_grad(loss_fn)(params, ids)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return train_step, jax.jit(loss_fn)


def batch_of(streams: list[np.ndarray], rng: np.random.Generator, seq: int) -> np.ndarray:
    """Sequences from random places, from each stream as often."""
    rows = []
    for _ in range(TOKENS_PER_STEP // seq):
        stream = streams[rng.integers(len(streams))]
        start = rng.integers(0, len(stream) - seq - 1)
        rows.append(stream[start : start + seq + 1])
    return np.stack(rows).astype(np.int32)


def held_out_loss(eval_loss, params, stream: np.ndarray) -> float:
    """Mean loss in nats per token over evenly spaced sequences of 256 tokens."""
    starts = np.linspace(0, len(stream) - 258, EVAL_SEQUENCES).astype(int)
    rows = np.stack([stream[s : s + 257] for s in starts]).astype(np.int32)
    return float(np.mean([eval_loss(params, part) for part in np.split(rows, 2)]))


def save_model(params: dict, tokenizer: Tokenizer, directory: Path) -> None:
    """Hugging Face layout: bf16 safetensors, config, tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, value in jax.tree_util.tree_flatten_with_path(params)[0]:
        *module, leaf = [p.key for p in path]
        value = np.asarray(value)
        suffix = "weight"
        if module[:2] == ["model", "layers"]:
            for i, layer in enumerate(value):
                name = ".".join(["model", "layers", str(i), *module[2:], suffix])
                tensors[name] = layer.T if leaf == "kernel" else layer
        else:
            tensors[".".join([*module, suffix])] = value.T if leaf == "kernel" else value
    # safetensors writes a transposed view wrongly: every array must be contiguous.
    tensors = {k: np.ascontiguousarray(v.astype(ml_dtypes.bfloat16)) for k, v in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        name: getattr(CONFIG, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
            "rms_norm_eps", "rope_theta", "attention_bias", "mlp_bias", "tie_word_embeddings",
            "model_type", "bos_token_id", "eos_token_id", "pad_token_id",
        )
    }  # fmt: skip
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": END, "eos_token": END, "pad_token": PAD}
    names |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
    names |= {"model_max_length": CONFIG.max_position_embeddings}
    (directory / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")


def draw(history: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    tokens = [h["tokens"] / 1e6 for h in history]
    axes.plot(tokens, [h["loss"] for h in history], label="training", color="#0072B2")
    evaluated = [h for h in history if "eval_loss" in h]
    axes.plot(
        [h["tokens"] / 1e6 for h in evaluated],
        [h["eval_loss"] for h in evaluated],
        label="held-out modules",
        color="#D55E00",
        marker="o",
        markersize=3,
    )
    axes.set(xlabel="tokens (millions)", ylabel="loss (nats per token)", title="Bundled base")
    axes.legend()
    figure.savefig(path, dpi=120)


def sample(directory: Path, prompt: str, new: int = 120, temperature: float = 0.5) -> str:
    """Continue a prompt with the saved model (no cache: the model is tiny)."""
    tokenizer, params = load_tokenizer(directory), load_params(directory)
    model = CausalLM(CONFIG)
    ids = tokenizer.encode(prompt).ids
    forward = jax.jit(lambda p, x: model.apply({"params": p}, x))
    rng, size = np.random.default_rng(0), len(ids) + new
    for _ in range(new):
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(forward(params, padded)[0, len(ids) - 1], np.float64) / temperature
        p = np.exp(logits - logits.max())
        ids.append(int(rng.choice(len(p), p=p / p.sum())))
        if ids[-1] == 0:
            break
    return tokenizer.decode(ids)


def load_tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def load_params(directory: Path) -> dict:
    tensors = load_file(directory / "model.safetensors")
    shapes = jax.eval_shape(CausalLM(CONFIG).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))

    def leaf(path, _):
        *module, leaf = [p.key for p in path]
        names = [".".join([*module, "weight"])]
        if module[:2] == ["model", "layers"]:
            names = [
                ".".join(["model", "layers", str(i), *module[2:], "weight"])
                for i in range(CONFIG.num_hidden_layers)
            ]
        arrays = [tensors[n].astype(np.float32) for n in names]
        arrays = [a.T if leaf == "kernel" else a for a in arrays]
        return np.stack(arrays) if module[:2] == ["model", "layers"] else arrays[0]

    return jax.tree_util.tree_map_with_path(leaf, shapes["params"])


def train(arguments: argparse.Namespace) -> None:
    directory: Path = arguments.output
    directory.mkdir(parents=True, exist_ok=True)
    modules = list(stdlib_modules())
    texts = [source for name, source in modules if not is_held_out(name)]
    tokenizer = (
        load_tokenizer(arguments.start / "model") if arguments.start else train_tokenizer(texts)
    )
    stream = token_stream(tokenizer, texts)
    held_out = token_stream(tokenizer, [s for name, s in modules if is_held_out(name)])
    streams = [stream]
    if arguments.tests:
        streams.append(token_stream(tokenizer, test_sources()))
    sizes = " + ".join(f"{len(s):,}" for s in streams)
    print(f"{sizes} training tokens, {len(held_out):,} held out", flush=True)

    model = CausalLM(CONFIG)
    params = init_params(model, jax.random.key(arguments.seed))
    if arguments.start:
        params = load_params(arguments.start / "model")
    tx = optimizer(params, arguments.learning_rate)
    state = tx.init(params)
    train_step, eval_loss = make_steps(model, tx)
    rng = np.random.default_rng(arguments.seed)
    history = read_history(arguments.start) if arguments.start else []
    before = history[-1] if history else {"step": 0, "tokens": 0, "cpu_minutes": 0.0}
    step, seen = before["step"], before["tokens"]
    started, cpu_started = time.time(), time.process_time()
    while (share := (time.process_time() - cpu_started) / (60 * arguments.cpu_minutes)) < 1:
        seq = [length for since, length in PHASES if share >= since][-1]
        state.hyperparams["scale"] = jnp.float32(learning_rate_scale(share, arguments.hold))
        params, state, loss = train_step(params, state, batch_of(streams, rng, seq))
        step, seen = step + 1, seen + TOKENS_PER_STEP
        if step % 10 == 0:
            cpu = before["cpu_minutes"] + (time.process_time() - cpu_started) / 60
            record = {"step": step, "tokens": seen, "cpu_minutes": cpu, "sequence": seq}
            record["loss"] = float(loss)
            if step % 100 == 0:
                record["eval_loss"] = held_out_loss(eval_loss, params, held_out)
                leave(directory, params, tokenizer, [*history, record])
            history.append(record)
            print(json.dumps(record), flush=True)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    last = {**history[-1], "step": step, "tokens": seen}
    history.append({**last, "eval_loss": held_out_loss(eval_loss, rounded, held_out)})
    leave(directory, params, tokenizer, history)
    draw(history, directory / "loss.png")
    print(
        f"{seen:,} tokens, {history[-1]['cpu_minutes']:.0f} processor minutes in all; this leg"
        f" {(time.time() - started) / 60:.0f} minutes on {platform.machine()}; held-out loss"
        f" {history[-1]['eval_loss']:.4f} nats per token"
    )


def leave(directory: Path, params: dict, tokenizer: Tokenizer, history: list[dict]) -> None:
    """What a leg leaves for the next one."""
    save_model(params, tokenizer, directory / "model")
    (directory / "history.jsonl").write_text("".join(json.dumps(h) + "\n" for h in history))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cpu-minutes", type=float, default=80)
    parser.add_argument("--start", type=Path, help="output of an earlier leg to go on from")
    parser.add_argument("--hold", type=float, default=0.6, help="share of the time before decay")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--tests", action="store_true", help="read the library's tests too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/pretrain_base"))
    parser.add_argument("--sample", help="continue this text with the saved model, and stop")
    arguments = parser.parse_args()
    if arguments.sample:
        print(sample(arguments.output / "model", arguments.sample))
    else:
        train(arguments)


if __name__ == "__main__":
    main()

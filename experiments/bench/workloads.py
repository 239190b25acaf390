"""What is measured, at which shape, against whom, and what is aimed at."""

import dataclasses
from typing import Any

Spec = dict[str, Any]

KEEP_NOTHING = "nothing"  # the remat policy that keeps only a layer's input, by lora_jax's name

BLOCK = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}
SMALL_BLOCK = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WIDE_BLOCK = BLOCK | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
}
MAIN: Spec = {"shape": BLOCK, "batch": 4, "seq": 256, "rank": 8, "alpha": 16}
SMALL: Spec = {"shape": SMALL_BLOCK, "batch": 2, "seq": 16, "rank": 4, "alpha": 8}
WIDE: Spec = MAIN | {"shape": WIDE_BLOCK, "batch": 1, "reference": False}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A case: which module builds it, what it is called, and whose loss it has to have."""

    key: str
    module: str
    case: str
    label: str
    group: str = ""
    peer: bool = False
    """Somebody else's: left out, with the reason, where it does not run."""
    gate: int = 3
    """Steps whose losses are compared before anything is timed."""
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    """What this case alone has in its environment."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: one case's figure over another's, or by itself."""

    text: str
    of: str
    over: str | None
    target: str | None = None
    stretch: str = ""
    metric: str = "wall"


@dataclasses.dataclass(frozen=True)
class Workload:
    """`kind` names the function of run.py that measures it."""

    name: str
    title: str
    kind: str
    spec: Spec
    small: Spec
    entries: tuple[Entry, ...]
    rows: tuple[Row, ...]
    rounds: int = 24
    shown: str = "wall"
    """The metric that the picture shows."""


def jax_case(key: str, case: str, label: str, group: str, **options: Any) -> Entry:
    return Entry(key, "cases_jax", case, label, group, **options)


def qwix_case(key: str, case: str, label: str, group: str) -> Entry:
    return Entry(key, "cases_qwix", case, label, group, peer=True)


def torch_case(key: str, case: str, label: str, group: str) -> Entry:
    return Entry(key, "cases_torch", case, label, group, peer=True)


LORA = jax_case("lora", "lora", "lora_jax LoRA", "adapter")
NF4 = jax_case("nf4", "nf4", "lora_jax NF4", "nf4")
QWIX_NF4 = qwix_case("qwix", "nf4", "qwix NF4, tile 64", "nf4")
BNB = torch_case("bnb", "bnb_nf4", "PEFT + bitsandbytes NF4", "nf4")
BNB_DOUBLE = torch_case(
    "bnb_double", "bnb_nf4_double", "PEFT + bitsandbytes NF4, double quantization", "nf4_double"
)
NF4_DOUBLE = jax_case("nf4_double", "nf4_double", "lora_jax NF4, double quantization", "nf4_double")

STEP = Workload(
    "lora",
    "A LoRA step in float32",
    "stepwise",
    MAIN,
    SMALL,
    (
        jax_case("full", "full", "full fine-tuning, JAX", "full"),
        jax_case("base", "base", "frozen base, forward and backward to inputs", "full", gate=1),
        torch_case("torch_full", "full", "full fine-tuning, torch", "full"),
        LORA,
        jax_case("train_step", "train_step", "lora_jax, step of lora_jax.train", "adapter"),
        jax_case("plain", "plain_autodiff", "lora_jax without its own VJP", "adapter"),
        jax_case("small_pages", "lora", "lora_jax LoRA, memory in pages of 4 KiB", "adapter",
                 env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}),
        qwix_case("qwix", "lora", "qwix LoRA", "adapter"),
        torch_case("peft", "peft", "PEFT LoRA, eager", "adapter"),
        torch_case("peft_compile", "peft_compile", "PEFT LoRA, torch.compile", "adapter"),
    ),
    (
        Row("CPU LoRA step over the frozen base", "lora", "base", "<= 1.15", "1.10"),
        Row("CPU LoRA step over PEFT eager", "lora", "peft", "<= 0.90"),
        Row("CPU LoRA step over qwix", "lora", "qwix", "<= 0.75"),
        Row("CPU LoRA step over PEFT with torch.compile", "lora", "peft_compile"),
        Row("CPU LoRA step over full fine-tuning in JAX", "lora", "full"),
        Row("PEFT eager over full fine-tuning in torch", "peft", "torch_full"),
        Row("full fine-tuning in JAX over torch", "full", "torch_full"),
        Row("PEFT eager over our frozen base", "peft", "base"),
        Row("qwix over our frozen base", "qwix", "base"),
        Row("LoRA step without our VJP over the frozen base", "plain", "base"),
        Row("step of lora_jax.train, loss in chunks, over the frozen base", "train_step", "base",
            "<= 1.15", "1.10"),
        Row("step of lora_jax.train over PEFT eager", "train_step", "peft", "<= 0.90"),
        Row("step of lora_jax.train over qwix", "train_step", "qwix", "<= 0.75"),
        Row("LoRA step with memory in pages of 4 KiB over that in large ones", "small_pages",
            "lora"),
    ),
)  # fmt: skip

NF4_STEP = Workload(
    "nf4",
    "A LoRA step over an NF4 base",
    "stepwise",
    MAIN,
    SMALL,
    (LORA, NF4, NF4_DOUBLE, QWIX_NF4, BNB, BNB_DOUBLE),
    (
        Row("CPU NF4 step over qwix NF4", "nf4", "qwix", "<= 0.75"),
        Row("CPU NF4 step over PEFT + bitsandbytes", "nf4", "bnb", "<= 0.95"),
        Row("the same, both with double quantization", "nf4_double", "bnb_double", "<= 0.95"),
        Row("NF4 step over the LoRA step in f32, 1,024 tokens", "nf4", "lora", "<= 1.08"),
        Row("the same with double quantization", "nf4_double", "lora", "<= 1.08"),
        Row("peak memory in a step over qwix's, d 512", "nf4", "qwix", None, metric="peak_step"),
        Row("temporaries of the compiled step over qwix's", "nf4", "qwix", None,
            metric="temp_bytes"),
    ),
)  # fmt: skip

INT4_STEP = Workload(
    "int4",
    "A LoRA step over an int4 base",
    "stepwise",
    MAIN,
    SMALL,
    # Where a tie is rounded differs, so that each is held to its own dequantized weights alone.
    (
        jax_case("int4", "int4", "lora_jax int4", "own"),
        qwix_case("qwix", "int4", "qwix int4, tile 64", "qwix"),
    ),
    (Row("CPU int4 step over qwix int4", "int4", "qwix"),),
)

DEQUANTIZE = Workload(
    "dequantize",
    "NF4 to float32, one matrix",
    "stepwise",
    {"matrix": [2048, 8192], "repeats": 4},
    {"matrix": [128, 256], "repeats": 4},
    (
        jax_case("nf4", "dequantize_nf4", "lora_jax", "nf4"),
        jax_case("nf4_double", "dequantize_nf4_double", "lora_jax, double quantization", "double"),
        qwix_case("qwix", "dequantize_nf4", "qwix", "nf4"),
        torch_case("bnb", "dequantize_nf4", "bitsandbytes", "nf4"),
        torch_case("bnb_double", "dequantize_nf4_double", "bitsandbytes, double quantization",
                   "double"),
    ),
    (
        Row("CPU NF4 dequantization over qwix's, 2048 x 8192", "nf4", "qwix", "<= 0.15"),
        Row("the same over bitsandbytes'", "nf4", "bnb"),
        Row("the same with double quantization", "nf4_double", "bnb_double"),
    ),
)  # fmt: skip

LOSS = Workload(
    "loss",
    "Cross-entropy and its gradient by the hidden states",
    "stepwise",
    {"batch": 8, "seq": 1024, "width": 256, "vocab": 16384},
    {"batch": 2, "seq": 64, "width": 16, "vocab": 128},
    (
        jax_case("plain", "plain_loss", "all logits at once", "loss"),
        jax_case("chunk_256", "chunk_256", "chunks of 256 tokens", "loss"),
        jax_case("chunk_1024", "chunk_1024", "chunks of 1024 tokens", "loss"),
    ),
    (
        Row("cross-entropy, chunks of 256 of 8,192 tokens, over plain: temporaries", "chunk_256",
            "plain", "<= 0.05", metric="temp_bytes"),
        Row("the same: time", "chunk_256", "plain", "<= 1.1"),
        Row("chunks of 1024 (the default) over plain: temporaries", "chunk_1024", "plain",
            "<= 0.05", metric="temp_bytes"),
        Row("the same: time", "chunk_1024", "plain", "<= 1.1"),
    ),
)  # fmt: skip

RESIDENT = Workload(
    "rss",
    "Peak memory of a process that trains, d 2048, 4 layers, 256 tokens",
    "resident",
    WIDE,
    SMALL | {"reference": False},
    (
        dataclasses.replace(LORA, group=""),
        NF4,
        dataclasses.replace(NF4_DOUBLE, group=""),
        QWIX_NF4,
        BNB,
    ),
    (
        Row("peak RSS of the NF4 step over qwix's", "nf4", "qwix", "<= 0.7", metric="peak_step"),
        Row("the same, loading and compiling included", "nf4", "qwix", None, metric="peak_life"),
        Row("peak RSS of the NF4 step over PEFT + bitsandbytes", "nf4", "bnb", None,
            metric="peak_step"),
        Row("peak RSS of the NF4 step over the f32 LoRA step", "nf4", "lora", None,
            metric="peak_step"),
    ),
    rounds=3,
    shown="peak_step",
)  # fmt: skip

COMPILE = Workload(
    "compile",
    "Time to an executable LoRA step, in a fresh process",
    "compilation",
    MAIN,
    SMALL,
    (
        jax_case("L4", "compilation", "4 layers, no cache", ""),
        jax_case("L4_warm", "compilation", "4 layers, warm cache", ""),
        jax_case("L64", "compilation", "64 layers, no cache", ""),
        jax_case("L64_warm", "compilation", "64 layers, warm cache", ""),
    ),
    (
        Row("compile time, L = 64 over L = 4", "L64", "L4", "<= 1.2", metric="compile_s"),
        Row("the same, tracing included", "L64", "L4", "<= 1.2", metric="total_s"),
        Row("compile time, warm cache over cold, L = 64", "L64_warm", "L64", "<= 0.25",
            metric="compile_s"),
        Row("the same, tracing included", "L64_warm", "L64", "<= 0.25", metric="total_s"),
    ),
    rounds=7,
    shown="total_s",
)  # fmt: skip

SLOPE = Workload(
    "memory",
    "Temporaries per layer of a rematerialized step, in carries",
    "slope",
    MAIN,
    SMALL,
    (
        jax_case("lora", "compilation", "LoRA, float32", ""),
        jax_case("nf4", "compilation", "LoRA over NF4", ""),
    ),
    (
        Row("memory slope under remat, LoRA (see below)", "lora", None, "<= 1.05",
            metric="carries"),
        Row("the same over NF4", "nf4", None, "<= 1.05", metric="carries"),
    ),
    rounds=1,
    shown="carries",
)  # fmt: skip

WORKLOADS = {
    w.name: w for w in (STEP, NF4_STEP, INT4_STEP, DEQUANTIZE, LOSS, RESIDENT, COMPILE, SLOPE)
}
GPU_TRAIN_ROWS = (
    Row("GPU: LoRA bf16, 8B, S 4096, 8,192 tokens a step: tok/s", "lora", None, ">= 13000",
        metric="tokens_per_s"),
    Row("GPU: QLoRA 8B over that", "nf4", "lora", ">= 0.92", metric="tokens_per_s"),
    Row("GPU: LoRA speed over PEFT with checkpointing", "lora", "peft", ">= 1.5",
        metric="tokens_per_s"),
    Row("GPU: QLoRA speed over PEFT + bitsandbytes", "nf4", "bnb", ">= 2", metric="tokens_per_s"),
    Row("GPU: DoRA step over the LoRA step", "dora", "lora", "<= 1.15"),
    Row("GPU: QLoRA with blocks recomputed, tok/s", "nf4_least", None, metric="tokens_per_s"),
    Row("GPU: PEFT, tok/s", "peft", None, metric="tokens_per_s"),
    Row("GPU: PEFT + bitsandbytes, tok/s", "bnb", None, metric="tokens_per_s"),
)  # fmt: skip
GPU_READ_ROWS = (
    Row("GPU: NF4 dequantization to bf16, TB/s", "dequantize", None, ">= 3",
        metric="terabytes_per_s"),
    Row("the same over bitsandbytes", "dequantize", "dequantize_bnb", None,
        metric="terabytes_per_s"),
    Row("GPU: batch-1 decode, bf16, tok/s", "decode", None, ">= 200", metric="tokens_per_s"),
    Row("GPU: batch-1 decode, NF4, tok/s", "decode_nf4", None, ">= 500", metric="tokens_per_s"),
)  # fmt: skip

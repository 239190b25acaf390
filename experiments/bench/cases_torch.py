"""torch beside it: transformers' Llama with PEFT, from the same files of weights and adapter."""

import functools
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from child import Case

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01  # as in cases_jax
Spec = dict[str, Any]


def load_model(spec: Spec, double_quant: bool | None = None) -> Any:
    """Llama, its linear layers in NF4 where `double_quant` is not None."""
    options: dict[str, Any] = {}
    if double_quant is not None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch.float32,
        )
        options["device_map"] = "cpu"
    model = transformers.LlamaForCausalLM.from_pretrained(
        Path(spec["dir"]) / "model", dtype=torch.float32, **options
    )
    model.config.use_cache = False
    return model.train()


def with_adapter(model: Any, spec: Spec) -> Any:
    directory = Path(spec["dir"]) / "adapter"
    return peft.PeftModel.from_pretrained(model, directory, is_trainable=True).train()


def tokens(spec: Spec) -> torch.Tensor:
    return torch.tensor(np.load(Path(spec["dir"]) / "ids.npy"), dtype=torch.long)


def training(model: Any, run: Any, spec: Spec, reference: float | None = None) -> Case:
    """A case whose step is the loss, its gradient and the optimizer."""
    ids = tokens(spec)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )  # fused is the fastest of torch's own

    def step() -> Any:
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    count = sum(p.numel() for p in weights)
    return Case(step, reference, {"trainable": count, "threads": torch.get_num_threads()})


def full(spec: Spec) -> Case:
    """Every parameter trained."""
    model = load_model(spec)
    return training(model, model, spec)


def lora(spec: Spec, compiled: bool = False) -> Case:
    """PEFT's LoRA, eager or through torch.compile."""
    model = with_adapter(load_model(spec), spec)
    return training(model, torch.compile(model) if compiled else model, spec)


def nf4(spec: Spec, double_quant: bool) -> Case:
    """PEFT's LoRA over bitsandbytes' NF4."""
    base = load_model(spec, double_quant)
    weights = dequantized(base) if spec.get("reference", True) else {}
    model = with_adapter(base, spec)
    reference = dense_loss(weights, spec) if weights else None
    del weights
    return training(model, model, spec, reference)


def dequantized(model: Any) -> dict[str, torch.Tensor]:
    bnb: Any = importlib.import_module("bitsandbytes")  # its types are incomplete
    return {
        f"{name}.weight": bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)
        for name, m in model.named_modules()
        if isinstance(m, bnb.nn.Linear4bit)
    }


def dense_loss(weights: dict[str, torch.Tensor], spec: Spec) -> float:
    """The loss of the dense model with bitsandbytes' dequantized weights."""
    model = load_model(spec)
    _, unexpected = model.load_state_dict(weights, strict=False)
    assert weights and not unexpected, unexpected
    ids = tokens(spec)
    with torch.no_grad():
        return float(with_adapter(model, spec)(input_ids=ids, labels=ids).loss)


def dequantization(spec: Spec, double_quant: bool) -> Case:
    """One matrix back to float32 by bitsandbytes, whose weights are (d_out, d_in)."""
    from bitsandbytes import functional

    values = np.random.default_rng(0).standard_normal(spec["matrix"], np.float32)
    weight = torch.from_numpy(np.ascontiguousarray(values.T))
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4"
    )
    error = float(torch.sqrt(torch.mean((functional.dequantize_4bit(packed, state) - weight) ** 2)))

    def run() -> float:
        for _ in range(spec["repeats"]):
            functional.dequantize_4bit(packed, state)
        return error

    return Case(run, None, {"threads": torch.get_num_threads()})


CASES = {
    "full": full,
    "peft": lora,
    "peft_compile": functools.partial(lora, compiled=True),
    "bnb_nf4": functools.partial(nf4, double_quant=False),
    "bnb_nf4_double": functools.partial(nf4, double_quant=True),
    "dequantize_nf4": functools.partial(dequantization, double_quant=False),
    "dequantize_nf4_double": functools.partial(dequantization, double_quant=True),
}

"""torch on the same card: PEFT and PEFT + bitsandbytes with gradient checkpointing."""

import functools
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from cases_torch import LEARNING_RATE, WEIGHT_DECAY, Spec
from child import Case

bnb: Any = importlib.import_module("bitsandbytes")  # its types are incomplete
TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def device_of(spec: Spec) -> torch.device:
    if spec["device"] == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("this torch has no CUDA")
    return torch.device("cuda" if spec["device"] == "gpu" else "cpu")


def base_model(spec: Spec, device: torch.device) -> Any:
    """From the gate's files, or with random weights made on the device."""
    llama: Any = transformers.LlamaForCausalLM
    if "dir" in spec:
        path = Path(spec["dir"]) / "model"
        return llama.from_pretrained(path, dtype=torch.bfloat16).to(device)
    config = transformers.LlamaConfig(**spec["shape"])
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return llama(config)
    finally:
        torch.set_default_dtype(torch.float32)


def in_nf4(model: Any, device: torch.device) -> Any:
    """The blocks' linear layers replaced by bitsandbytes', one after the other."""
    layers = [
        (parent, name, linear)
        for parent in model.model.modules()
        for name, linear in parent.named_children()
        if isinstance(linear, torch.nn.Linear)
    ]
    for parent, name, linear in layers:
        new = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False,
            compute_dtype=torch.bfloat16, quant_type="nf4", device="meta",
        )  # fmt: skip
        new.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        ).to(device)
        setattr(parent, name, new)
    model.is_loaded_in_4bit = True  # PEFT asks for it
    return model


def training(spec: Spec, quantized: bool = False) -> Case:
    """Loss, gradients and AdamW with bfloat16 autocast, blocks recomputed."""
    device = device_of(spec)
    model = base_model(spec, device)
    model.requires_grad_(False)
    model = in_nf4(model, device) if quantized else model
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = with_adapter(model, spec).to(device).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    ids = tokens(spec).to(device)

    def step() -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Case(
        step,
        facts={"amount": ids.numel()},
        finish=functools.partial(finished, device),
        device_peak=functools.partial(device_peak, device),
    )


def with_adapter(model: Any, spec: Spec) -> Any:
    if "dir" in spec:
        path = Path(spec["dir"]) / "adapter"
        return peft.PeftModel.from_pretrained(model, path, is_trainable=True)
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=spec["rank"], lora_alpha=spec["alpha"], target_modules=TARGETS,
            init_lora_weights=False,
        ),
    )  # fmt: skip


def tokens(spec: Spec) -> torch.Tensor:
    if "dir" in spec:
        return torch.tensor(np.load(Path(spec["dir"]) / "ids.npy"), dtype=torch.long)
    return torch.randint(spec["shape"]["vocab_size"], (spec["batch"], spec["seq"]))


def dequantization(spec: Spec) -> Case:
    """The same stack, one matrix after the other."""
    device, (layers, *shape) = device_of(spec), spec["matrix"]
    weight = torch.randn(*reversed(shape), dtype=torch.bfloat16, device=device)
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    scales = weight.numel() / 64
    amount = spec["repeats"] * layers * (2.5 * weight.numel() + scales + 4 * scales / 256)

    def run() -> float:
        for _ in range(spec["repeats"] * layers):
            bnb.functional.dequantize_4bit(packed, state)
        return 0.0

    return Case(run, facts={"amount": amount}, finish=functools.partial(finished, device))


def finished(device: torch.device, result: Any) -> Any:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result


def device_peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


CASES = {
    "peft": training,
    "bnb": functools.partial(training, quantized=True),
    "dequantize": dequantization,
}

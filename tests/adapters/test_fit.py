"""Whether an adapter fits a base: what an error tells of one that does not, and GPT-2's kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import InputError, LoraConfig, init_adapter
from lora_jax.adapters import load_adapter, save_adapter
from lora_jax.lora import KernelLayout

LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}


def test_the_first_of_every_kind_that_does_not_fit(tmp_path):
    params = {"model": {"layers": {"q_proj": {"kernel": jnp.ones((3, 4, 6))}}}}
    config = LoraConfig(r=3, target_modules=["q_proj"])
    adapter = init_adapter(jax.random.key(0), params, config, layouts=LAYOUTS)
    save_adapter(tmp_path / "a", adapter, config, layouts=LAYOUTS)
    stem = "base_model.model.model.layers"

    def damage(tensors):
        for i in range(3):
            tensors.pop(f"{stem}.{i}.q_proj.lora_A.weight")
            tensors[f"{stem}.{i}.q_proj.lora_B.weight"] = np.zeros((7, 3), np.float32)
            tensors[f"{stem}.{i}.k_proj.lora_A.weight"] = np.zeros((3, 4), np.float32)

    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(InputError) as error:
        load_adapter(tmp_path / "a", params, layouts=LAYOUTS)
    assert str(error.value).partition("safetensors: ")[2] == (
        f"{stem}.0.q_proj.lora_B.weight has shape (7, 3), this base needs (6, 3); no tensor"
        f" {stem}.0.q_proj.lora_A.weight, which the config and this base call for; no place for"
        f" {stem}.0.k_proj.lora_A.weight; and 6 more; the adapter was made for another base, or"
        " one that was changed (new tokens, say)"
    )


def gpt2(d_in, d_out, layers):
    """A base with GPT-2's names for what its adapters touch."""
    return {
        "transformer": {
            "h": {
                "attn": {
                    "c_attn": {"kernel": jax.ShapeDtypeStruct((layers, d_in, d_out), "float32")}
                },
                "mlp": {"c_fc": {"kernel": jax.ShapeDtypeStruct((layers, d_in, 8), "float32")}},
            }
        }
    }


def test_kernels_that_torch_keeps_the_other_way_round(data_dir, safetensors_shapes):
    """GPT-2's, from a file that says they are not: A and B have the same shapes either way."""
    directory = data_dir / "adapters" / "phuongsky_gpt2"
    shapes = safetensors_shapes(directory / "adapter_model.safetensors")
    layers = len({key.split(".h.")[1].split(".")[0] for key in shapes})
    layouts = {"transformer/h": KernelLayout(stack="transformer/h")}
    base = gpt2(768, 3 * 768, layers)
    adapter, config = load_adapter(directory, base, layouts=layouts)
    assert not config.fan_in_fan_out and layers == 6
    layer = adapter["transformer"]["h"]["attn"]["c_attn"]
    assert layer["lora_A"].shape == (6, 768, 8) and layer["lora_B"].shape == (6, 8, 2304)


def test_trained_biases_of_a_part_of_a_stack_are_not_read(tmp_path):
    def base(layers):
        return {"q": {"kernel": jnp.ones((layers, 4, 6)), "bias": jnp.ones((layers, 6))}}

    layouts = {"q": KernelLayout(stack="q")}
    config = LoraConfig(r=2, target_modules=["q.0"], bias="lora_only")
    adapter = init_adapter(jax.random.key(0), base(1), config, layouts=layouts)
    save_adapter(tmp_path, adapter, config, layouts=layouts)
    assert load_adapter(tmp_path, base(1), layouts=layouts)[1] == config
    with pytest.raises(InputError, match="q/bias of all stacked layers, and q/1 is not adapted"):
        load_adapter(tmp_path, base(2), layouts=layouts)

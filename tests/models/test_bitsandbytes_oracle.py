"""Checkpoints in bitsandbytes' 4 bits, read without torch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

from safetensors.numpy import load_file, save_file  # noqa: E402

from lora_jax import QuantConfig  # noqa: E402
from lora_jax._errors import InputError  # noqa: E402
from lora_jax._tree import leaves_with_path  # noqa: E402
from lora_jax.models import load_pretrained  # noqa: E402
from lora_jax.quant import QuantizedTensor  # noqa: E402

pytestmark = pytest.mark.oracle


def four_bits(directory, out, *, double=True, skip=(), also=()):
    """The same directory with its blocks' kernels as bitsandbytes saves them; the dense values."""
    out.mkdir()
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (out / "config.json").write_text(json.dumps(config))
    tensors, dense = {}, {}
    for name, value in load_file(directory / "model.safetensors").items():
        if not ("proj" in name or name in also) or name in skip:
            tensors[name] = value
            continue
        packed, state = functional.quantize_4bit(
            torch.from_numpy(value), quant_type="nf4", compress_statistics=double
        )
        tensors[name] = packed.numpy()
        tensors |= {f"{name}.{k}": v.numpy() for k, v in state.as_dict(packed=True).items()}
        dense[name] = functional.dequantize_4bit(packed, state).numpy()
    save_file(tensors, out / "model.safetensors")
    return dense


@pytest.mark.parametrize("double", [False, True])
def test_kernels_are_theirs(tmp_path, model_dir, double):
    dense = four_bits(model_dir, tmp_path / "m", double=double)
    pretrained = load_pretrained(tmp_path / "m")
    layers = pretrained.params["model"]["layers"]
    for path, leaf in leaves_with_path(layers):
        if not path.endswith("kernel"):
            continue
        assert isinstance(leaf, QuantizedTensor)
        for i, kernel in enumerate(np.asarray(leaf.unbox())):
            name = f"model.layers.{i}.{path}".replace("/", ".").replace("kernel", "weight")
            np.testing.assert_allclose(kernel.T, dense[name], rtol=0, atol=1e-6)
    ids = jnp.ones((1, 5), jnp.int32)
    logits = jax.jit(pretrained.module.apply)({"params": pretrained.params}, ids)
    assert np.isfinite(logits).all()


def test_a_head_outside_of_the_stack(tmp_path, model_dir):
    dense = four_bits(model_dir, tmp_path / "m", also=["lm_head.weight"])
    kernel = load_pretrained(tmp_path / "m").params["lm_head"]["kernel"]
    assert isinstance(kernel, QuantizedTensor)
    np.testing.assert_allclose(kernel.unbox().T, dense["lm_head.weight"], rtol=0, atol=1e-6)


def test_what_cannot_be_read_is_refused(tmp_path, model_dir):
    one = "model.layers.1.mlp.up_proj.weight"
    four_bits(model_dir, tmp_path / "m")
    with pytest.raises(InputError, match="is in four bits already; leave quant out"):
        load_pretrained(tmp_path / "m", quant=QuantConfig())
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    lost = {k: v for k, v in tensors.items() if k != f"{one}.absmax"}
    save_file(lost, tmp_path / "m" / "model.safetensors")
    with pytest.raises(InputError, match=f"{one}.absmax is missing"):
        load_pretrained(tmp_path / "m")
    lost = {k: v for k, v in tensors.items() if k != one}
    save_file(lost, tmp_path / "m" / "model.safetensors")
    with pytest.raises(InputError, match=f"{one} is missing, whose"):
        load_pretrained(tmp_path / "m")
    four_bits(model_dir, tmp_path / "table", also=["model.embed_tokens.weight"])
    with pytest.raises(InputError, match="which only kernels may be; keep it dense"):
        load_pretrained(tmp_path / "table")
    four_bits(model_dir, tmp_path / "mixed", skip=[one])
    with pytest.raises(InputError, match=f"{one} is not quantized, but"):
        load_pretrained(tmp_path / "mixed")

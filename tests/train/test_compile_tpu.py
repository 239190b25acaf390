"""A train step compiled for a TPU v5e that is not here: memory, never speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax.plan._plan import ENVIRONMENT

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CODE = """
import json, sys
import jax, jax.numpy as jnp, optax
from jax.experimental import topologies
from lora_jax import LoraConfig, QuantConfig, init_adapter, lora_linen
from lora_jax.lora import KernelLayout
from lora_jax.models import CausalLM, ModelConfig, abstract_params
from lora_jax.optim import freeze_base
from lora_jax.train import init_state, make_step

remat, layers = sys.argv[1], int(sys.argv[2])
device = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices[0]
config = ModelConfig(vocab_size=512, hidden_size=512, intermediate_size=1024,
                     num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2)
base = abstract_params(config, quant=QuantConfig(), param_dtype="bfloat16")
lora = LoraConfig(r=8, target_modules="all-linear")
layouts = {"model/layers": KernelLayout(stack="model/layers")}
tx = freeze_base(optax.adamw(1e-4))
state = jax.eval_shape(
    lambda key: init_state(init_adapter(key, base, lora, layouts=layouts), tx, key),
    jax.random.key(0),
)
batches = {
    name: jax.ShapeDtypeStruct((1, 1, 512), dtype)
    for name, dtype in (("input_ids", jnp.int32), ("positions", jnp.int32),
                        ("segment_ids", jnp.int32), ("loss_mask", jnp.bool_))
}
sharding = jax.sharding.SingleDeviceSharding(device)
shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (state, base, batches)
)
step = make_step(lora_linen(CausalLM(config, dtype=jnp.bfloat16, remat=remat)), tx, chunk=128)
memory = step.lower(*shapes).compile().memory_analysis()
print(json.dumps({
    "temporaries": memory.temp_size_in_bytes,
    "host": memory.host_temp_size_in_bytes,
    "gradients": 4 * sum(x.size for x in jax.tree.leaves(state.trainable)),
    "carry": 512 * 512 * 2,
}))
"""


def memory_of(remat: str, layers: int) -> dict[str, int]:
    run = subprocess.run(
        [sys.executable, "-c", CODE, remat, str(layers)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_layer_costs_its_carry_and_its_adapter():
    few, many = memory_of("nothing", 4), memory_of("nothing", 20)
    gradients = many["gradients"] - few["gradients"]
    grown = many["temporaries"] - few["temporaries"]
    # Adapter gradients are padded to the tiles of the chip's memory.
    assert grown <= 16 * few["carry"] + 2 * gradients


def test_offloaded_tensors_are_in_host_memory():
    kept, sent = memory_of("names", 20), memory_of("offload", 20)
    assert kept["host"] == 0 and sent["host"] >= 3 * 20 * sent["carry"]
    assert sent["temporaries"] < kept["temporaries"]

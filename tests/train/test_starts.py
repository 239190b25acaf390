"""Runs whose adapter starts from the weights, and what they leave: a plain adapter."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import QuantConfig, combine, lora_linen
from lora_jax.adapters import load_adapter
from lora_jax.models import load_pretrained
from lora_jax.quant import QuantizedTensor
from lora_jax.train import load_config, prepare, prepare_abstract, run
from tests import compiled

IDS = jnp.arange(3, 27).reshape(2, 12)


@pytest.mark.parametrize(
    ("fields", "quant"),
    [
        ({"init_lora_weights": "pissa", "use_dora": True, "lora_alpha": 12}, None),
        pytest.param({"init_lora_weights": "loftq"}, QuantConfig(), marks=pytest.mark.slow),
    ],
)
def test_its_adapter_goes_with_the_base_as_it_is(make_config, base_dir, fields, quant):
    config = make_config(lora={"r": 4, **fields}, quant=quant, train={"steps": 2})
    job = prepare(config)
    result = run(job)
    trained = combine(job.base, result.trainable)
    expected = compiled.apply(lora_linen(job.pretrained.module), trained, IDS)
    written = json.loads((result.directory / "adapter" / "adapter_config.json").read_text())
    assert written["init_lora_weights"] is True and not written["loftq_config"]
    assert written["r"] == (8 if quant is None else 4)
    base = load_pretrained(base_dir, quant=quant)
    adapter, _ = load_adapter(result.directory / "adapter", base.params, layouts=base.layouts)
    params = combine(base.params, adapter)
    ours = compiled.apply(lora_linen(base.module), params, IDS)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "eva", "target_modules": ["q_proj", "down_proj", "lm_head"]},
        pytest.param(
            {"init_lora_weights": "corda", "target_modules": ["q_proj"]}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "random"}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["eva", "corda", "lora_ga"],
)
def test_a_start_from_data_is_saved_plain_and_goes_on(make_config, base_dir, fields):
    lora = {"r": 4, "lora_alpha": 12, **fields}
    config = make_config(lora=lora, train={"steps": 4, "save_every": 2, "start_batches": 2})
    job = prepare(config)
    result = run(job)
    trained = combine(job.base, result.trainable)
    expected = compiled.apply(lora_linen(job.pretrained.module), trained, IDS)
    base = load_pretrained(base_dir)
    adapter, read = load_adapter(result.directory / "adapter", base.params, layouts=base.layouts)
    params = combine(base.params, adapter)
    ours = compiled.apply(lora_linen(base.module), params, IDS)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    if fields["init_lora_weights"] == "eva":
        assert read.eva_config == job.config.lora.eva_config
        ranks = [rank for target in job.targets for rank in target.ranks]
        assert sum(ranks) == 4 * len(ranks) and len(set(ranks)) > 1
    else:
        assert (read.r, read.init_lora_weights) == (8, True)

    # Cut off after two steps, made ready again, and gone on: the same file.
    again = dataclasses.replace(config, output=f"{config.output}-again")

    def dies(record):
        if record["step"] == 3:
            raise ZeroDivisionError

    again = dataclasses.replace(again, train=dataclasses.replace(again.train, log_every=1))
    with pytest.raises(ZeroDivisionError):
        run(prepare(again), listener=dies)
    resumed = run(prepare(load_config(Path(again.output, "config.yaml"))), resume=True)
    name = Path("adapter", "adapter_model.safetensors")
    assert (resumed.directory / name).read_bytes() == (result.directory / name).read_bytes()


def test_eva_over_four_bits(make_config):
    lora = {"init_lora_weights": "eva", "target_modules": ["q_proj", "up_proj"]}
    job = prepare(make_config(lora=lora, quant=QuantConfig(), train={"start_batches": 1}))
    layer = job.base["model"]["layers"]["self_attn"]["q_proj"]
    assert isinstance(layer["kernel"], QuantizedTensor)
    a = np.asarray(job.trainable["model"]["layers"]["self_attn"]["q_proj"]["lora_A"])
    rank = job.targets[0].ranks[0]
    np.testing.assert_allclose(a[0, :, :rank].T @ a[0, :, :rank], np.eye(rank), atol=1e-5)


def test_what_is_no_target_is_quantized_too(make_config):
    lora = {"init_lora_weights": "loftq", "target_modules": ["q_proj"]}
    job = prepare(make_config(lora=lora, quant=QuantConfig(head="int8")))
    layer = job.base["model"]["layers"]
    kernels = (layer["self_attn"]["q_proj"], layer["mlp"]["up_proj"], job.base.get("lm_head"))
    for module in kernels:
        assert module is None or isinstance(module["kernel"], QuantizedTensor)


@pytest.mark.parametrize(
    ("lora", "quant"),
    [
        ({"init_lora_weights": "olora"}, None),
        ({"init_lora_weights": "loftq"}, QuantConfig()),
        ({"init_lora_weights": "corda"}, None),
        ({"init_lora_weights": "lora_ga"}, None),
        ({"use_dora": True}, QuantConfig()),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, None),
    ],
)
def test_shapes_are_those_of_the_run(make_config, lora, quant):
    """A plan sees what a run will have, with nothing computed."""
    config = make_config(lora=lora, quant=quant)
    real, planned = prepare(config), prepare_abstract(config)
    for ours, shapes in ((real.base, planned.base), (real.trainable, planned.trainable)):
        assert jax.tree.structure(ours) == jax.tree.structure(shapes)
        pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(shapes), strict=True)
        assert all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in pairs)
    assert real.counts() == planned.counts()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"init_lora_weights": "pissa"}, "'pissa' over a quantized base .* use 'loftq'"),
        ({"init_lora_weights": "corda"}, "'corda' over a quantized base"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga' over a quantized base"),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}},
            "after more than one loftq_iter the base is another",
        ),
    ],
)
def test_a_base_that_nobody_could_make_again(make_config, message_of, lora, message):
    said = message_of(prepare, make_config(lora=lora, quant=QuantConfig()))
    assert re.search(message, said)

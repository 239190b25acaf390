"""What is no adapter, no slot or no sum: refused in a line, before anything is computed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import (
    InputError,
    LoraConfig,
    QuantConfig,
    init_adapter,
    init_with_base,
    resize_adapter,
    without_start,
)
from lora_jax.adapters import (
    AdapterBank,
    delta_spectra,
    load_adapter,
    save_adapter,
    weighted_adapter,
)
from lora_jax.lora import choose_rows

BASE = {"q": {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}}
CONFIG = LoraConfig(r=2, lora_alpha=3, target_modules=["q"], init_lora_weights=False)


def adapter(config=CONFIG):
    return init_adapter(jax.random.key(1), BASE, config)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga"])
def test_a_base_that_no_file_tells_of_is_not_saved_for_another(tmp_path, init):
    """PEFT would move the base by another start, or not at all, and say nothing."""
    config = dataclasses.replace(CONFIG, init_lora_weights=init)
    with pytest.raises(InputError, match=f"'{init}' moved the base .* without_start"):
        save_adapter(tmp_path / "a", adapter(), config)
    assert not (tmp_path / "a").exists()
    plain, config = without_start(adapter(), adapter(), config)
    save_adapter(tmp_path / "a", plain, config)
    loaded, read = load_adapter(tmp_path / "a", BASE)
    assert read.init_lora_weights is True
    delta = loaded["q"]["lora_A"] @ loaded["q"]["lora_B"]
    np.testing.assert_allclose(delta, 0, atol=1e-6)


def test_an_adapter_of_loftq_stays_with_its_quantized_base(tmp_path):
    config = dataclasses.replace(CONFIG, init_lora_weights="loftq")
    base, made = init_with_base(jax.random.key(0), BASE, config, QuantConfig())
    with pytest.raises(InputError, match="without_start: .*loftq"):
        without_start(made, made, config)
    with pytest.raises(InputError, match=r"save it by config\.with_usual_start\(\)"):
        save_adapter(tmp_path / "a", made, config)
    save_adapter(tmp_path / "a", made, config.with_usual_start())
    loaded, _ = load_adapter(tmp_path / "a", base)
    np.testing.assert_array_equal(loaded["q"]["lora_A"], made["q"]["lora_A"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 10**30}, "the rank r must be at most 65536"),
        ({"rank_pattern": {"q": 10**12}}, "the rank q must be at most 65536"),
        ({"lora_alpha": 10**400}, "must be positive and finite, got 1000"),
        ({"rank_pattern": {"(?i)q": 2}}, "'.*q' is not a regular expression: global flags"),
        (
            {"layers_pattern": "(?P<number>h)", "layers_to_transform": 0, "target_modules": ["q"]},
            "is not a regular expression: redefinition",
        ),
    ],
    ids=["rank", "pattern of ranks", "alpha", "flags", "group"],
)
def test_what_a_damaged_config_asks_for(tmp_path, fields, words):
    save_adapter(tmp_path, adapter(), CONFIG)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(InputError, match=words):
        load_adapter(tmp_path, BASE)


def test_half_of_an_alternative_has_no_layer_number():
    base = {"model": {"layers": {"0": BASE}}}
    config = LoraConfig(target_modules=["q"], layers_pattern="layers|h", layers_to_transform=0)
    with pytest.raises(InputError, match="no module is left to adapt"):
        init_adapter(jax.random.key(0), base, config)


A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({A: t[A] * np.nan}), "not all finite"),
        (lambda t: t.update({A: t[A][:1]}), "have no rank in common"),
        (lambda t: t.update({A: t[A][:1], B: t[B][:, :1]}), "q has rank 1 in the file, and 2 by"),
        (lambda t: t.update({A: t[A].ravel()}), "have no rank in common"),
    ],
    ids=["nan", "ranks", "another config", "axes"],
)
def test_a_damaged_pair_has_no_spectrum(tmp_path, change, words):
    save_adapter(tmp_path, adapter(), CONFIG)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    with pytest.raises(InputError, match=words):
        delta_spectra(tmp_path)


def test_whole_numbers_are_no_weights(tmp_path):
    save_adapter(tmp_path, adapter(), CONFIG)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: x.astype(np.int32) for k, x in load_file(path).items()}, path)
    with pytest.raises(InputError, match="lora_A.weight holds int32"):
        load_adapter(tmp_path, BASE)


def test_slots_that_are_not_there():
    bank = AdapterBank.empty(BASE, CONFIG, slots=2).swap("a", adapter())
    for rows in ([0, 2], [-2, 0]):
        with pytest.raises(InputError, match=r"slots from 0 to 1, or -1 for the plain base"):
            bank.overlay(jnp.array(rows))
    assert choose_rows(bank.slots, jnp.array([1, -1]))["q"]["lora_rows"].tolist() == [1, -1]


def test_an_odd_rank_is_no_matter_once_the_start_is_over():
    config = LoraConfig(r=2, target_modules=["q"], init_lora_weights="orthogonal")
    small, config = resize_adapter(adapter(config), config, 1)
    assert small["q"]["lora_A"].shape == (64, 1) and config.init_lora_weights is True


def test_what_began_with_data_is_added_to_what_has_biases():
    eva = dataclasses.replace(CONFIG, init_lora_weights="eva")
    biased = dataclasses.replace(CONFIG, lora_bias=True)
    pairs = [(adapter(), eva), (adapter(biased), biased)]
    made, config = weighted_adapter(pairs, [1.0, 2.0], "cat")
    assert config.lora_bias and config.eva_config is None and "lora_B_bias" in made["q"]

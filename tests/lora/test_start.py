"""Starts that a config names, and the way back to a plain adapter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import (
    InputError,
    LoraConfig,
    QuantConfig,
    init_adapter,
    init_olora,
    init_pissa,
    init_with_base,
    merge_adapter,
    resize_adapter,
    without_start,
)
from lora_jax.adapters import weighted_adapter
from lora_jax.lora import KernelLayout

KEY = jax.random.key(0)
BASE = {
    "layers": {"q": {"kernel": jax.random.normal(KEY, (3, 24, 16))}},
    "head": {"kernel": jax.random.normal(jax.random.key(1), (16, 20))},
}
LAYOUTS = {"layers": KernelLayout(stack="layers")}
CONFIG = LoraConfig(
    r=4, lora_alpha=12, target_modules=["q", "head"], rank_pattern={r"layers\.1\.q": 2},
    layers_to_transform=None,
)  # fmt: skip


def close(got, want, error=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=error * np.abs(b).max())


@pytest.mark.parametrize(
    ("init", "rslora", "dora"),
    [
        ("pissa", False, False),
        ("pissa", True, True),
        ("pissa_niter_8", True, False),
        ("olora", False, False),
        ("olora", True, True),
    ],
)
def test_base_and_adapter_are_the_weight_together(init, rslora, dora):
    config = dataclasses.replace(CONFIG, init_lora_weights=init, use_rslora=rslora, use_dora=dora)
    moved, start = init_with_base(KEY, BASE, config, layouts=LAYOUTS)
    close(merge_adapter(moved, start, layouts=LAYOUTS), BASE)
    assert not np.allclose(moved["layers"]["q"]["kernel"], BASE["layers"]["q"]["kernel"])
    # As trained: every part is another.
    keys = iter(jax.random.split(KEY, 20))
    trained = jax.tree.map(lambda x: x * (1 + 0.2 * jax.random.normal(next(keys), x.shape)), start)
    for path in ("layers", "head"):
        part = trained["layers"]["q"] if path == "layers" else trained["head"]
        part["lora_scaling"] = (start["layers"]["q"] if path == "layers" else start["head"])[
            "lora_scaling"
        ]
    plain, plain_config = without_start(trained, start, config)
    expected = merge_adapter(moved, trained, layouts=LAYOUTS)
    close(merge_adapter(BASE, plain, layouts=LAYOUTS), expected)
    assert (plain_config.r, plain_config.init_lora_weights) == (8, True)
    assert plain_config.scaling("head") == pytest.approx(config.scaling("head"))
    # Ranks that differ leave their padding behind what is used.
    a = np.asarray(plain["layers"]["q"]["lora_A"])
    assert a.shape == (3, 24, 8) and a[1, :, :4].any() and not a[1, :, 4:].any()


def test_the_randomized_start_comes_near_the_exact_one():
    # Singular values that fall, as those of weights do.
    q, _ = jnp.linalg.qr(jax.random.normal(KEY, (64, 48)))
    p, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (48, 48)))
    base = {"q": {"kernel": q * (0.9 ** jnp.arange(48)) @ p}}
    config = LoraConfig(r=8, target_modules=["q"])
    exact, _ = init_pissa(base, config)
    errors = [
        float(jnp.linalg.norm(init_pissa(base, config, niter=n)[0]["q"]["kernel"]))
        / float(jnp.linalg.norm(exact["q"]["kernel"]))
        for n in (1, 4, 16)
    ]
    assert errors[0] < 1.02 and errors[1] < 1.001 and errors[2] < 1.00001


def test_orthogonal_rows_and_no_delta():
    config = LoraConfig(r=4, target_modules=["head"], init_lora_weights="orthogonal")
    adapter = init_adapter(KEY, BASE, config, layouts=LAYOUTS)["head"]
    a, b = np.asarray(adapter["lora_A"]), np.asarray(adapter["lora_B"])
    assert np.abs(a).max() > 0.05 and np.abs(b).max() > 0.05
    np.testing.assert_allclose(a @ b, 0, atol=1e-6)


def test_loftq_through_the_config():
    config = LoraConfig(
        r=4, target_modules=["q"], init_lora_weights="loftq", loftq_config={"loftq_iter": 3}
    )
    base = {"q": {"kernel": jax.random.normal(KEY, (64, 64))}}
    quantized, adapter = init_with_base(KEY, base, config, QuantConfig())
    merged = merge_adapter(quantized, adapter, dtype=jnp.float32)["q"]["kernel"]
    bare = jnp.linalg.norm(quantized["q"]["kernel"].unbox() - base["q"]["kernel"])
    assert jnp.linalg.norm(merged - base["q"]["kernel"]) < 0.95 * bare


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"init_lora_weights": "pisa"}, r"'pisa' is not supported \(did you mean 'pissa'\?\)"),
        ({"init_lora_weights": "pissa_niter_0"}, "is not supported"),
        ({"init_lora_weights": "orthogonal", "r": 3}, r"needs even ranks, got \(3,\)"),
        ({"loftq_config": {"loftq_iter": 2}}, "loftq_config goes with init_lora_weights='loftq'"),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}},
            "loftq_bits=2 is not supported",
        ),
        ({"use_dora": 1}, "use_dora must be true or false, got 1"),
    ],
)
def test_wrong_starts_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        LoraConfig(**fields)


def test_a_start_that_moves_the_base_is_not_half_made():
    config = LoraConfig(r=2, target_modules=["head"], init_lora_weights="olora")
    with pytest.raises(InputError, match="'olora' moves the base too; call init_with_base"):
        init_adapter(KEY, BASE, config)
    with pytest.raises(InputError, match="'loftq' needs a quant section"):
        init_with_base(KEY, BASE, dataclasses.replace(config, init_lora_weights="loftq"))
    plain = dataclasses.replace(config, init_lora_weights=True)
    with pytest.raises(InputError, match="leaves the base as it is"):
        init_with_base(KEY, BASE, plain, QuantConfig())
    with pytest.raises(InputError, match="rank 17 exceeds the smaller side"):
        init_olora(BASE, dataclasses.replace(config, r=17))


def test_neither_magnitudes_nor_moved_bases_add_up():
    config = LoraConfig(r=4, target_modules=["head"], init_lora_weights="pissa")
    _, adapter = init_with_base(KEY, BASE, config)
    for refused in (
        lambda: resize_adapter(adapter, config, 2),
        lambda: weighted_adapter([(adapter, config)] * 2, [1.0, 1.0], "cat"),
    ):
        with pytest.raises(InputError, match="belongs to the base which that moved"):
            refused()
    dora = LoraConfig(r=4, target_modules=["head"], use_dora=True)
    adapter = init_adapter(KEY, BASE, dora)
    with pytest.raises(InputError, match="deltas under DoRA do not add up"):
        weighted_adapter([(adapter, dora)] * 2, [1.0, 1.0], "cat")
    # A delta of another rank has the same norms.
    small, _ = resize_adapter(adapter, dora, 2)
    assert small["head"]["lora_magnitude"] is adapter["head"]["lora_magnitude"]

"""Another rank for an adapter: what is kept, and what can still learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import InputError, LoraConfig, init_adapter, resize_adapter
from lora_jax.adapters import save_adapter
from lora_jax.lora import KernelLayout

KEY = jax.random.key(0)
LAYOUTS = {"layers": KernelLayout(stack="layers")}
BASE = {
    "layers": {"q": {"kernel": jnp.zeros((2, 8, 6))}, "norm": {"scale": jnp.ones((2, 8))}},
    "embed": {"embedding": jnp.zeros((9, 8))},
}
CONFIG = LoraConfig(
    r=4, lora_alpha=10, target_modules=["q", "embed"], init_lora_weights=False,
    rank_pattern={"layers.1.q": 2, "embed": 1}, alpha_pattern={"layers.0.q": 5}, use_rslora=True,
)  # fmt: skip


def deltas(adapter):
    """scaling·A·B of the stack and of the table, in float64."""
    found = []
    for leaves, prefix in ((adapter["layers"]["q"], ""), (adapter.get("embed"), "embedding_")):
        if leaves:
            a, b, s = (np.float64(leaves[f"{prefix}lora_{part}"]) for part in ("A", "B", "scaling"))
            found.append(s[..., None, None] * (a @ b))
    return found


@pytest.mark.parametrize("rank", [4, 5, 12])
def test_no_smaller_rank_loses_anything(rank):
    adapter = init_adapter(KEY, BASE, CONFIG, layouts=LAYOUTS)
    resized, config = resize_adapter(adapter, CONFIG, rank)
    for new, old in zip(deltas(resized), deltas(adapter), strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-6 * np.abs(old).max())
    assert config.r == config.lora_alpha == rank == resized["layers"]["q"]["lora_B"].shape[1]
    assert config.scaling("layers/1/q") == 1 and not config.rank_pattern
    np.testing.assert_array_equal(resized["layers"]["q"]["lora_scaling"], 1)


def test_a_smaller_rank_is_the_nearest():
    adapter = init_adapter(KEY, BASE, CONFIG, layouts=LAYOUTS)
    for rank in (1, 2, 3):
        resized, _ = resize_adapter(adapter, CONFIG, rank)
        for new, old in zip(deltas(resized), deltas(adapter), strict=True):
            s = np.linalg.svd(old, compute_uv=False)[..., rank:]
            left = np.linalg.norm(old - new, axis=(-2, -1))
            np.testing.assert_allclose(left, np.sqrt((s**2).sum(-1)), rtol=1e-4, atol=1e-5)


def test_added_directions_can_learn():
    """A is orthonormal in all its columns, B zero in the rows that are new."""
    adapter = init_adapter(KEY, BASE, CONFIG, layouts=LAYOUTS)
    resized, _ = resize_adapter(adapter, CONFIG, 6)
    a, b = (np.asarray(resized["layers"]["q"][name]) for name in ("lora_A", "lora_B"))
    np.testing.assert_allclose(a.mT @ a, np.broadcast_to(np.eye(6), (2, 6, 6)), atol=1e-5)
    assert np.abs(b[0, 4:]).max() < 1e-6 and np.abs(b[1, 2:]).max() < 1e-6


def test_layers_without_an_adapter_stay_without(tmp_path):
    config = LoraConfig(
        r=2, target_modules=["q"], layers_to_transform=[1], layers_pattern="layers",
        init_lora_weights=False, modules_to_save=["norm"], adapter_dtype="bfloat16",
    )  # fmt: skip
    adapter = init_adapter(KEY, BASE, config, layouts=LAYOUTS)
    resized, config = resize_adapter(adapter, config, 3)
    leaves = resized["layers"]["q"]
    np.testing.assert_array_equal(leaves["lora_scaling"], [0, 1])
    assert not leaves["lora_A"][0].any() and not leaves["lora_B"][0].any()
    assert leaves["lora_A"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(resized["layers"]["norm"]["scale"], 1)
    save_adapter(tmp_path / "a", resized, config, layouts=LAYOUTS)


def test_what_cannot_be_resized():
    with pytest.raises(InputError, match="rank must be a positive integer, got 0"):
        resize_adapter({}, CONFIG, 0)
    with pytest.raises(InputError, match="q/lora_A has no q/lora_scaling beside it"):
        resize_adapter({"q": {"lora_A": jnp.ones((2, 1)), "lora_B": jnp.ones((1, 2))}}, CONFIG, 1)

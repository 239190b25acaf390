"""Spectra of deltas, read from files that others and we wrote."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax import InputError, KernelLayout, LoraConfig, init_adapter
from lora_jax.adapters import DeltaSpectrum, delta_spectra, load_adapter, save_adapter


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_values_are_those_of_the_dense_delta(tmp_path):
    base = {"q": {"kernel": normal(12, 20)}, "narrow": {"kernel": normal(12, 3)}}
    config = LoraConfig(r=5, lora_alpha=15, target_modules=["q", "narrow"], init_lora_weights=False)
    adapter = init_adapter(jax.random.key(1), {"q": base["q"], "narrow": base["q"]}, config)
    # A file may hold a rank above a matrix's smaller side; here no new adapter does.
    adapter["narrow"]["lora_B"] = adapter["narrow"]["lora_B"][:, :3]
    save_adapter(tmp_path, adapter, config)
    assert load_adapter(tmp_path, base)[0]["narrow"]["lora_B"].shape == (5, 3)
    found = {x.module: x for x in delta_spectra(tmp_path)}
    for name, own in adapter.items():
        dense = 3 * np.asarray(own["lora_A"], np.float64) @ np.asarray(own["lora_B"], np.float64)
        values = np.linalg.svd(dense, compute_uv=False)[:5]
        np.testing.assert_allclose(found[name].values[: len(values)], values, rtol=1e-10)
        assert found[name].rank == len(found[name].values) == 5
        assert found[name].norm == pytest.approx(np.linalg.norm(dense))
    # Three outputs have no more than three directions.
    assert not found["narrow"].values[3:].any()


@pytest.mark.parametrize(
    ("values", "effective", "suggested"),
    [
        ([1, 1, 1, 1], 4.0, 4),
        ([5, 0, 0, 0], 1.0, 1),
        ([3, 3, 0.1, 0.1], 2.31, 2),
        ([0, 0], 0.0, 0),
    ],
)
def test_effective_and_suggested_rank(values, effective, suggested):
    found = DeltaSpectrum("q", len(values), np.asarray(values, np.float64))
    assert found.effective_rank == pytest.approx(effective, abs=0.01)
    assert found.suggested_rank == suggested


def test_layers_come_in_their_order(tmp_path):
    pairs = {}
    for i in (10, 9, 0):
        key = f"base_model.model.layers.{i}.q"
        pairs[f"{key}.lora_A.weight"] = np.ones((2, 4), np.float32)
        pairs[f"{key}.lora_B.weight"] = np.ones((6, 2), np.float32)
    save_file(pairs, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "peft_type": "LORA"}))
    assert [x.module for x in delta_spectra(tmp_path)] == [
        "layers.0.q",
        "layers.9.q",
        "layers.10.q",
    ]


@pytest.mark.parametrize("name", ["llama32-1b_r8_qv", "bertbase_mts_r8", "gemma3-270m_r4_qv"])
def test_adapters_of_others_for_any_model(data_dir, name):
    directory = data_dir / "adapters" / name
    rank = json.loads((directory / "adapter_config.json").read_text())["r"]
    found = delta_spectra(directory)
    assert {x.rank for x in found} == {rank}
    assert all(0 < x.effective_rank <= rank + 1e-9 for x in found if x.norm)


def test_what_holds_no_pairs_is_refused(tmp_path):
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no pair of lora_A and lora_B"):
        delta_spectra(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="pickled weights are never opened"):
        delta_spectra(tmp_path)


def test_experts_of_parameters_with_ranks_and_alphas_of_their_own(tmp_path):
    """Three experts of rank 2 have as many rows as one matrix of rank 6, and are none."""
    base = {"experts": {"up": normal(3, 8, 12), "down": normal(3, 12, 8)}}
    layouts = {"experts": KernelLayout(contracting=(0,), experts=True)}
    config = LoraConfig(
        r=6, lora_alpha=9, target_parameters=["experts.up", "experts.down"],
        rank_pattern={"experts.down": 2}, init_lora_weights=False,
    )  # fmt: skip
    adapter = init_adapter(jax.random.key(1), base, config, layouts=layouts)
    save_adapter(tmp_path, adapter, config, layouts=layouts)
    found = {x.module: x.values for x in delta_spectra(tmp_path)}
    assert len(found) == 6
    for name, scaling in (("up", 1.5), ("down", 4.5)):
        a, b = (np.asarray(adapter["experts"][f"{name}_lora_{x}"], np.float64) for x in "AB")
        for i in range(3):
            values = np.linalg.svd(scaling * a[i] @ b[i], compute_uv=False)
            own = found[f"experts.{name}.{i}"]
            np.testing.assert_allclose(own, values[: len(own)], rtol=1e-9)

"""`lora inspect ADAPTER` as a person meets it."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax import LoraConfig, init_adapter
from lora_jax.adapters import save_adapter
from lora_jax.cli import main
from lora_jax.models import load_pretrained


@pytest.fixture
def adapter_dir(base_dir, tmp_path):
    """q has not moved; of v's four directions one is all that counts."""
    base = load_pretrained(base_dir)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    adapter = init_adapter(jax.random.key(0), base.params, config, layouts=base.layouts)
    v = adapter["model"]["layers"]["self_attn"]["v_proj"]
    v["lora_B"] = jnp.ones_like(v["lora_B"])
    save_adapter(tmp_path / "adapter", adapter, config, layouts=base.layouts)
    return tmp_path / "adapter"


def test_a_table_and_what_it_says(adapter_dir, base_dir, capsys, tmp_path):
    picture = tmp_path / "rank.png"
    main(["inspect", str(adapter_dir), "--model", str(base_dir), "--picture", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "module",
        "r",
        "effective",
        "needed",
        "norm",
        "of",
        "base",
        "spectrum",
    ]
    v = next(line.split() for line in lines if line.startswith("model.layers.1.self_attn.v_proj"))
    assert v[1:4] == ["4", "1.0", "1"] and v[5].endswith("%")
    weight = load_pretrained(base_dir).params["model"]["layers"]["self_attn"]["v_proj"]["kernel"]
    share = float(v[4]) / float(np.linalg.norm(weight[1]))
    assert float(v[5].rstrip("%")) / 100 == pytest.approx(share, rel=0.01)
    assert any("q_proj" in line and "(nothing)" in line for line in lines)
    assert lines[-2].startswith("rank 1 keeps 99 % of nine modules in ten (given 4;")
    assert lines[-1] == "2 of 4 modules have not moved"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ADAPTER", "--quant"], "takes no --quant"),
        (["ADAPTER", "--data.train_rows", "3"], "takes no --data.train_rows"),
        (["BASE"], "holds no adapter_config.json; of a model, --quant tells"),
        (["BASE", "--quant", "--picture", "x.png"], "takes no --picture"),
        (["nowhere"], "nowhere: no such directory"),
        (["ADAPTER", "--model", "OTHER"], "has no model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_what_it_refuses(adapter_dir, base_dir, tmp_path, capsys, words, message):
    other = tmp_path / "other"
    other.mkdir()
    save_file({"model.x.weight": np.ones(2, np.float32)}, other / "model.safetensors")
    shutil.copyfile(base_dir / "config.json", other / "config.json")
    places = {"ADAPTER": str(adapter_dir), "BASE": str(base_dir), "OTHER": str(other)}
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *(places.get(word, word) for word in words)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1 and message in err

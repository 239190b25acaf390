"""EVA, CorDA and LoRA-GA beside PEFT's, on a random Llama and batches with masks."""

import dataclasses
import importlib.util
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT's CorDA takes one decorator from attrs, which it does not ask for.
if importlib.util.find_spec("attr") is None:
    sys.modules["attr"] = types.SimpleNamespace(dataclass=dataclasses.dataclass)  # type: ignore[assignment]

from peft.tuners.lora.config import CordaConfig  # noqa: E402
from peft.tuners.lora.corda import preprocess_corda  # noqa: E402
from peft.tuners.lora.loraga import preprocess_loraga  # noqa: E402

from lora_jax import LoraConfig, combine, lora_linen  # noqa: E402
from lora_jax.adapters import (  # noqa: E402
    init_corda,
    init_eva,
    init_lora_ga,
    load_adapter,
    save_adapter,
)
from lora_jax.lora import KernelLayout, as_matrix, matched_targets  # noqa: E402
from lora_jax.models import load_pretrained  # noqa: E402

pytestmark = pytest.mark.oracle
LAYOUTS = {"model/layers": KernelLayout(stack="model/layers")}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GENERATOR = np.random.default_rng(0)
IDS = GENERATOR.integers(0, 60, (2, 6, 12))
MASK = np.ones_like(IDS)
MASK[:, 1, 9:] = 0
LABELS = np.where((MASK == 1) & (np.arange(12) >= 3), IDS, -100)
BATCHES = [
    {"input_ids": i, "attention_mask": m, "labels": y}
    for i, m, y in zip(IDS, MASK, LABELS, strict=True)
]


def torch_batch(batch):
    return {name: torch.from_numpy(x) for name, x in batch.items()}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    directory = tmp_path_factory.mktemp("model") / "model"
    transformers.LlamaForCausalLM(shape).save_pretrained(directory)
    return directory


@pytest.fixture
def theirs(model_dir):
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def ours(model_dir):
    return load_pretrained(model_dir)


def logits(pretrained, params, batch):
    model = lora_linen(pretrained.module)
    ids, segments = (jnp.asarray(batch[name]) for name in ("input_ids", "attention_mask"))
    return model.apply({"params": params}, ids, segment_ids=segments)


def forward_of(pretrained):
    return lambda params, batch: logits(pretrained, params, batch)


def single_layers(params, config):
    """(name, kernel, A, B, scaling) of every adapted layer of ours, as matrices in numpy."""
    for target in matched_targets(params, config, layouts=LAYOUTS):
        node = params
        for part in target.path.split("/")[:-1]:
            node = node[part]
        for i, (name, rank) in enumerate(zip(target.names, target.ranks, strict=True)):
            if rank:
                kernel, a, b = (np.asarray(node[x][i]) for x in ("kernel", "lora_A", "lora_B"))
                kernel = as_matrix(kernel, target.layout.contracting or (0,))
                yield name.replace("/", "."), kernel, a[:, :rank], b[:rank], target.scalings[i]


def their_layers(model):
    return {
        name: module
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


def factors(module):
    a = module.lora_A["default"].weight.detach().numpy().T
    return a, module.lora_B["default"].weight.detach().numpy().T


def check_logits(model, pretrained, params):
    """After the start both compute the same, and over the same tokens."""
    with torch.no_grad():
        batch = torch_batch(BATCHES[0])
        expected = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    counts = MASK[0] == 1
    expected = expected.numpy()[counts]
    got = jax.jit(lambda params: logits(pretrained, params, BATCHES[0]))(params)
    got = np.asarray(got)[counts]
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({}, {}),
        # PEFT whitens once for every layer that shares an input: here none does.
        (
            {"whiten": True, "use_label_mask": False},
            {"use_rslora": True, "target_modules": ["q_proj", "o_proj", "down_proj"]},
        ),
        ({"adjust_scaling_factors": False}, {"rank_pattern": {"q_proj": 5, r"1\.mlp\.up_proj": 3}}),
        ({"rho": 1.0}, {"r": 16, "alpha_pattern": {"o_proj": 20}}),
        ({"rho": 16.0}, {"r": 1, "target_modules": ["q_proj", "o_proj", "down_proj"]}),
    ],
    ids=["defaults", "whiten", "ranks", "no redistribution", "dropped"],
)
def test_eva(theirs, ours, model_dir, tmp_path, options, fields):
    fields = {"r": 8, "lora_alpha": 12, "target_modules": ALL, **fields}
    model = peft.get_peft_model(
        theirs,
        peft.LoraConfig(**fields, init_lora_weights="eva", eva_config=peft.EvaConfig(**options)),
    )
    # PEFT looks at a batch until nothing turns: twice, if there is one.  Its decomposition is
    # exact where twice the components are all there are.
    batch = torch_batch(BATCHES[0])
    peft.initialize_lora_eva_weights(model, dataloader=[batch], show_progress_bar=False)
    expected = their_layers(model)

    config = LoraConfig(**fields, init_lora_weights="eva", eva_config=options)
    base, adapter, config = init_eva(
        forward_of(ours), ours.params, config, [BATCHES[0]] * 2, layouts=LAYOUTS
    )
    assert base is ours.params
    found = {name: rest for name, *rest in single_layers(combine(base, adapter), config)}
    assert found.keys() == expected.keys()
    for name, (_, a, b, scaling) in found.items():
        their_a, _ = factors(expected[name])
        assert a.shape == their_a.shape, name
        assert scaling == pytest.approx(expected[name].scaling["default"])
        assert not b.any()
        # The same vectors, but for their signs.
        cosines = np.sum(a * their_a, axis=0) / np.sum(their_a**2, axis=0)
        np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-5)
    check_logits(model, ours, combine(base, adapter))

    # PEFT loads what we save, by its own patterns.
    save_adapter(tmp_path / "ours", adapter, config, layouts=LAYOUTS)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    loaded = their_layers(peft.PeftModel.from_pretrained(fresh, tmp_path / "ours"))
    for name, (_, a, _, scaling) in found.items():
        np.testing.assert_array_equal(factors(loaded[name])[0], a)
        assert loaded[name].scaling["default"] == pytest.approx(scaling)
    # And we load what PEFT saved.
    model.save_pretrained(tmp_path / "theirs")
    read, their_config = load_adapter(tmp_path / "theirs", ours.params, layouts=LAYOUTS)
    for name, _, a, _, scaling in single_layers(combine(ours.params, read), their_config):
        np.testing.assert_array_equal(a, factors(expected[name])[0])
        assert scaling == pytest.approx(expected[name].scaling["default"])


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda(theirs, ours, method):
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ALL, "rank_pattern": {"1.*q_proj": 2}}
    rows = [{"input_ids": row[None]} for row in IDS.reshape(-1, 12)]
    config = peft.LoraConfig(
        **fields,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
    )

    def run():
        for row in rows:
            theirs(torch.from_numpy(row["input_ids"]))

    preprocess_corda(theirs, config, run_model=run)
    expected = their_layers(peft.get_peft_model(theirs, config))
    ones = [{**row, "attention_mask": np.ones((1, 12), np.int32)} for row in rows]
    config = LoraConfig(**fields, init_lora_weights="corda", corda_config={"corda_method": method})
    base, adapter = init_corda(forward_of(ours), ours.params, config, ones, layouts=LAYOUTS)
    found = list(single_layers(combine(base, adapter), config))
    assert {name for name, *_ in found} == expected.keys()
    for name, kernel, a, b, _ in found:
        their_a, their_b = factors(expected[name])
        assert a.shape == their_a.shape
        product = their_a @ their_b
        largest = np.abs(product).max()
        np.testing.assert_allclose(a @ b, product, rtol=0, atol=1e-4 * largest)
        lengths = np.linalg.norm(their_a, axis=0)
        error = 1e-4 * lengths.max()
        np.testing.assert_allclose(np.linalg.norm(a, axis=0), lengths, rtol=0, atol=error)
        their_base = expected[name].base_layer.weight.detach().numpy().T
        np.testing.assert_allclose(kernel, their_base, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"direction": "A2rBr", "scale": "weight_svd"},
        {"direction": "ArBr", "scale": "gd_scale"},
        {"direction": "ArBr", "scale": "unit"},
        {"stable_gamma": 64},
    ],
    ids=str,
)
def test_lora_ga(theirs, ours, options):
    # Where four times the rank are all directions, PEFT's randomized decomposition is exact.
    fields = {"r": 16, "lora_alpha": 20, "target_modules": ["q_proj", "o_proj", "down_proj"]}
    ga = peft.LoraGAConfig(**options)
    config = peft.LoraConfig(**fields, init_lora_weights="lora_ga", lora_ga_config=ga)

    def their_step():
        for batch in BATCHES:
            theirs(**torch_batch(batch)).loss.backward()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        preprocess_loraga(theirs, config, their_step)
    model = peft.get_peft_model(theirs, config)
    expected = their_layers(model)

    def loss(params, batch):
        log_p = jax.nn.log_softmax(logits(ours, params, batch)[:, :-1])
        targets = jnp.maximum(batch["labels"], 0)[:, 1:, None]
        counts = batch["labels"][:, 1:] != -100
        of_target = jnp.take_along_axis(log_p, targets, axis=-1)[..., 0]
        return -jnp.sum(jnp.where(counts, of_target, 0.0)) / jnp.sum(counts)

    config = LoraConfig(**fields, init_lora_weights="lora_ga", lora_ga_config=options)
    base, adapter = init_lora_ga(loss, ours.params, config, BATCHES, layouts=LAYOUTS)
    for name, kernel, a, b, scaling in single_layers(combine(base, adapter), config):
        their_a, their_b = factors(expected[name])
        of_a = np.sign(np.sum(a * their_a, axis=0))
        of_b = np.sign(np.sum(b * their_b, axis=1))
        # Up to signs, which decide the product, and by it the base.
        for got, want in ((a * of_a, their_a), (b * of_b[:, None], their_b)):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
        their_base = expected[name].base_layer.weight.detach().numpy().T
        whole = kernel + scaling * a @ b
        moved = whole - scaling * (a * of_a) @ (b * of_b[:, None])
        np.testing.assert_allclose(moved, their_base, rtol=0, atol=1e-4 * np.abs(whole).max())
    check_logits(model, ours, combine(base, adapter))


def test_what_began_as_mica_is_read(theirs, ours, tmp_path):
    """It leaves the base alone, so that its file is one like any other."""
    options = peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights="mica")
    model = peft.get_peft_model(theirs, options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    adapter, config = load_adapter(tmp_path, ours.params, layouts=LAYOUTS)
    assert config.init_lora_weights is True
    check_logits(model, ours, combine(ours.params, adapter))

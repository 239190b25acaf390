"""Flax's own modules and transformations compute, adapted, what they do with merged weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lora_jax import InputError, combine, lora_linen, merge_adapter, with_dropout
from lora_jax.lora import KernelLayout
from tests.transform.adapted import KEY, check, close, inputs, start

MANY = dict(variable_axes={"params": 0}, split_rngs={"params": True})


def net(forward):
    """A module of these few lines."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, **options):
            return forward(self, x, **options)

    return Net()


CELLS = {
    "lstm": nn.LSTMCell,
    "optimized lstm": nn.OptimizedLSTMCell,
    "simple": nn.SimpleCell,
    "gru": nn.GRUCell,
    "mgu": nn.MGUCell,
}


@pytest.mark.parametrize(
    ("name", "quantized"), [*((name, False) for name in CELLS), ("optimized lstm", True)]
)
def test_recurrent_cells(name, quantized):
    check(net(lambda _, x: nn.RNN(CELLS[name](3))(x)), inputs(2, 5, 4), quantized=quantized)


def test_recurrent_convolutions():
    model = net(lambda _, x: nn.RNN(nn.ConvLSTMCell(3, (2, 2), name="cell"))(x))
    check(model, inputs(2, 3, 4, 4, 2), targets=["ih", "hh"])


def test_recurrence_in_both_directions():
    @net
    def model(_, x):
        cells = (nn.RNN(nn.OptimizedLSTMCell(3, name=name)) for name in ("there", "back"))
        return nn.Bidirectional(*cells)(x)

    check(model, inputs(2, 5, 4))


def test_loops_and_branches():
    """One layer in `nn.while_loop`, `nn.cond` and `nn.switch`."""

    @net
    def model(module, x):
        dense = nn.Dense(x.shape[-1], name="dense")
        if module.is_initializing():
            return dense(x)

        def body(module, carry):
            i, x = carry
            return i + 1, nn.tanh(dense(x))

        _, x = nn.while_loop(lambda _, carry: carry[0] < 3, body, module, (0, x))
        x = nn.cond(True, lambda _, x: dense(x), lambda _, x: x, module, x)
        branches = [lambda _, x: x, lambda _, x: nn.tanh(dense(x))]
        return nn.switch(1, branches, module, x)

    # A while loop has no gradient in reverse: the outputs alone.
    x = inputs(2, 4)
    params, adapter, layouts, _ = start(model, x)
    out = lora_linen(model).apply({"params": combine(params, adapter)}, x)
    merged = merge_adapter(params, adapter, layouts=layouts)
    close(out, model.apply({"params": merged}, x))


def test_branches_have_gradients():
    @net
    def model(module, x):
        dense = nn.Dense(x.shape[-1], name="dense")
        if module.is_initializing():
            return dense(x)
        x = nn.cond(True, lambda _, x: dense(x), lambda _, x: x, module, x)
        return nn.switch(1, [lambda _, x: x, lambda _, x: nn.tanh(dense(x))], module, x)

    check(model, inputs(2, 4))


def test_remat_of_a_scan_of_scans_and_cached_traces():
    @net
    def model(_, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                inner = nn.jit(nn.remat(nn.Dense))
                return x + nn.tanh(inner(x.shape[-1], name="dense")(x)), None

        return nn.remat(nn.scan(Block, length=3, **MANY))(name="layers")(x, None)[0]

    check(model, inputs(2, 4))


def test_a_layer_that_a_scan_over_time_shares():
    @net
    def model(_, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, carry, x):
                carry = nn.tanh(nn.Dense(4, name="dense")(jnp.concatenate([carry, x], -1)))
                return carry, carry

        over_time = dict(variable_broadcast="params", split_rngs={"params": False})
        scanned = nn.scan(Step, in_axes=1, out_axes=1, **over_time)
        return scanned(name="step")(jnp.zeros((len(x), 4)), x)[1]

    check(model, inputs(2, 5, 3))


def test_statistics_masks_and_randomness():
    """BatchNorm's averages move, and Dropout drops, as they do without an adapter."""

    @net
    def model(_, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                x = nn.BatchNorm(use_running_average=False)(nn.Dense(4, name="dense")(x))
                return nn.Dropout(0.5, deterministic=False)(x), None

        axes = dict(variable_axes={"params": 0, "batch_stats": 0})
        rngs = dict(split_rngs={"params": True, "dropout": True})
        x, _ = nn.scan(Block, length=2, **axes, **rngs)(name="layers")(x, None)
        return nn.Dense(3, name="head")(x)

    call = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(5)}}
    check(model, inputs(8, 4), call=call, rtol=1e-4)


def test_a_cache_of_attention():
    """Token by token, as a decoder goes: the cache holds adapted keys and values."""
    model = net(lambda _, x, **options: nn.MultiHeadDotProductAttention(2, **options)(x))
    x = inputs(2, 5, 4)
    variables = model.init(KEY, x, decode=True)
    params, cache = variables["params"], variables["cache"]
    _, adapter, layouts, _ = start(model, x)
    trees = combine(params, adapter), merge_adapter(params, adapter, layouts=layouts)
    ours, merged = ({"params": tree, "cache": cache} for tree in trees)
    call = dict(decode=True, mutable=["cache"])
    for i in range(3):
        token = x[:, i : i + 1]
        out, ours["cache"] = _decoded(lora_linen(model), ours, token, call)
        expected, merged["cache"] = _decoded(model, merged, token, call)
        close((out, ours["cache"]), (expected, merged["cache"]))


def _decoded(model, variables, token, call):
    out, new = model.apply(variables, token, **call)
    return out, new["cache"]


def test_what_a_module_shows_of_itself():
    """Intermediate outputs are captured, and values sown, where they are without an adapter."""

    @net
    def model(module, x):
        x = nn.Conv(3, (2,), name="conv")(nn.Dense(4, name="dense")(x))
        module.sow("intermediates", "mean", jnp.mean(x))
        return x

    call = {"capture_intermediates": True, "mutable": ["intermediates"]}
    check(model, inputs(2, 5, 4), targets=["conv", "dense"], call=call)


def normed(wrap, **arguments):
    @net
    def model(_, x):
        x = wrap(nn.Dense(5, name="dense"))(x, **arguments)
        return nn.Dense(3, name="head")(nn.tanh(x))

    return model


@pytest.mark.parametrize("quantized", [False, True])
def test_weight_norm(quantized):
    check(normed(nn.WeightNorm), inputs(2, 4), quantized=quantized)


def test_weight_norm_of_a_convolution():
    model = net(lambda _, x: nn.WeightNorm(nn.Conv(5, (2,), name="conv"))(x))
    check(model, inputs(2, 5, 4), targets=["conv"], given={"conv": KernelLayout((0, 1))})


@pytest.mark.parametrize("update_stats", [False, True])
def test_spectral_norm(update_stats):
    call = {"mutable": ["batch_stats"]} if update_stats else {}
    check(normed(nn.SpectralNorm, update_stats=update_stats), inputs(2, 4), call=call)


def test_parameters_mapped_by_one_s_own_function():
    """It finds boxes, as those of `nn.with_partitioning`, and opens them."""

    def squared(params):
        return jax.tree.map(jnp.square, nn.meta.unbox(params))

    @net
    def model(module, x):
        init = module.is_initializing()
        return nn.map_variables(nn.Dense, "params", squared, init=init)(3, name="dense")(x)

    check(model, inputs(2, 4))


def test_a_scope_that_modules_share():
    class Twice(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)
            nn.share_scope(self, self.dense)

        def __call__(self, x):
            return self.dense(nn.tanh(self.dense(x)))

    @net
    def model(_, x):
        return Twice(name="dense")(x)

    params, *_ = check(model, inputs(2, 4))
    assert set(params["dense"]) == {"kernel", "bias"}


def test_normed_weights_are_read_whole():
    """What a norm divides by is the length of the adapted weight: there is no input to drop."""
    model, x = normed(nn.WeightNorm), inputs(2, 4)
    params, adapter, *_ = start(model, x)
    dropped = combine(params, with_dropout(KEY, adapter, 0.1))
    with pytest.raises(InputError, match="dense/kernel: lora_dropout needs a layer"):
        lora_linen(model).apply({"params": dropped}, x)


def test_a_name_that_looks_like_a_path():
    model, x = normed(nn.WeightNorm), inputs(2, 4)
    params, adapter, *_ = start(model, x, targets=["head"], modules_to_save=["WeightNorm_0"])
    with pytest.raises(ValueError, match="names begin with WeightNorm_0/dense/"):
        combine(params, adapter)

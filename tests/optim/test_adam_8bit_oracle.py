"""Parameters and states equal to those of bitsandbytes' 8-bit AdamW.

Its CPU kernel finds codes through a table of rounded inputs: 3 in 100 codes of a second moment are
not the nearest, and a zero gets code 7.  Here its update runs with its portable quantizer, which
finds the nearest, as its GPU kernels do.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")

from lora_jax.optim import _adam_8bit, adam_8bit  # noqa: E402
from lora_jax.quant._codebook import dynamic_values, midpoints  # noqa: E402

pytestmark = pytest.mark.oracle

KEY = torch._C.DispatchKey.CompositeExplicitAutograd
SHAPES = [(64, 64), (3, 31, 47), (70, 60), (10, 9)]
STEPS = 6


@pytest.fixture(autouse=True)
def portable_quantizer(monkeypatch):
    quantize = torch.ops.bitsandbytes.quantize_blockwise.default

    def direct(values, code, absmax_out, codes_out, blocksize):
        codes, absmax = quantize._op_dk(KEY, values, code, blocksize)
        codes_out.copy_(codes)
        absmax_out.copy_(absmax)

    name = "bitsandbytes.backends.cpu.ops._quant_blockwise_fp32_direct"
    monkeypatch.setattr(name, direct)


@pytest.mark.parametrize("signed", [True, False])
def test_maps_are_equal_to_rounding(signed):
    ours = dynamic_values(jnp.arange(256, dtype=jnp.uint8), signed=signed)
    theirs = bitsandbytes.functional.create_dynamic_map(signed=signed)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-7)


def numbers(seed, shape):
    """Of very different sizes, as gradients are, and some exact zeros."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=shape) * 10.0 ** generator.uniform(-4, 0, size=shape)
    return np.float32(np.where(generator.random(shape) < 0.05, 0, x))


def theirs(shape, dtype, weight_decay):
    """Their parameter, states and gradient after each step."""
    parameter = torch.nn.Parameter(torch.from_numpy(numbers(0, shape)).to(dtype))
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": weight_decay}
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], **options)
    for step in range(STEPS):
        parameter.grad = torch.from_numpy(numbers(step + 1, shape)).to(dtype)
        optimizer.step()
        state = {k: v.numpy() for k, v in optimizer.state[parameter].items() if k[:3] != "ste"}
        yield parameter.detach().float().numpy().copy(), jax.tree.map(np.copy, state)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_are_theirs(shape, weight_decay, dtype):
    params = jnp.asarray(numbers(0, shape), dtype)
    tx = adam_8bit(0.01, 0.9, 0.99, 1e-6, weight_decay)
    state, update = tx.init(params), jax.jit(tx.update)
    for step, (parameter, kept) in enumerate(theirs(shape, getattr(torch, dtype), weight_decay)):
        gradient = jnp.asarray(numbers(step + 1, shape), dtype)
        # Float32 updates, so that bfloat16 rounds once, as theirs does.
        updates, state = update(gradient.astype(jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        moved = np.abs(parameter - numbers(0, shape)).max()
        # The last rounding, to the parameter's own type, may go the other way.
        last = np.abs(parameter) * float(jnp.finfo(dtype).eps)
        error = np.abs(np.float32(params) - parameter)
        assert np.all(error <= last + 2e-5 * moved)
        assert np.mean(error > 2e-5 * moved) < 0.01
        state = with_theirs(state, kept)
        # A tie may fall either way; from here on both go on from the same codes.
        params = jnp.asarray(parameter, dtype)


def with_theirs(state, kept):
    """Compare the moments, then take theirs."""
    adam = state[0]
    if "absmax1" not in kept:
        for ours, name in ((adam.mu, "state1"), (adam.nu, "state2")):
            scale = np.abs(kept[name]).max()
            np.testing.assert_allclose(ours, kept[name], rtol=1e-6, atol=1e-6 * scale)
        return (adam._replace(mu=kept["state1"], nu=kept["state2"]), *state[1:])
    taken = {}
    for name, number in (("mu", 1), ("nu", 2)):
        ours, codes = getattr(adam, name), kept[f"state{number}"]
        assert ours.codes.shape == codes.shape and ours.codes.dtype == codes.dtype
        np.testing.assert_allclose(ours.absmax, kept[f"absmax{number}"], rtol=1e-6)
        differ = np.asarray(ours.codes).astype(int) - codes
        assert np.abs(differ).max() <= 1 and np.mean(differ != 0) < 1e-3, name
        taken[name] = _adam_8bit.Bytes(jnp.asarray(codes), jnp.asarray(kept[f"absmax{number}"]))
    return (adam._replace(**taken), *state[1:])


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_their_portable_quantizer(signed):
    x = numbers(3, (5000,))
    x = x if signed else x**2
    code = bitsandbytes.functional.create_dynamic_map(signed=signed)
    quantize = torch.ops.bitsandbytes.quantize_blockwise.default
    codes, absmax = (t.numpy() for t in quantize._op_dk(KEY, torch.from_numpy(x), code, 256))
    ours = _adam_8bit.to_bytes(jnp.asarray(x), signed=signed)
    np.testing.assert_array_equal(ours.absmax, absmax)
    scaled = x / np.repeat(absmax, 256)[: x.size]
    at_a_boundary = np.isclose(scaled[:, None], midpoints(code.numpy()), rtol=1e-6, atol=0).any(1)
    np.testing.assert_array_equal(np.asarray(ours.codes)[~at_a_boundary], codes[~at_a_boundary])

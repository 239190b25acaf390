"""Reading what bitsandbytes quantized, against what it dequantizes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

from lora_jax import QuantConfig  # noqa: E402
from lora_jax._errors import InputError  # noqa: E402
from lora_jax.quant import quantize, quantized_matmul, read_bitsandbytes  # noqa: E402

pytestmark = pytest.mark.oracle


def saved(shape, quant_type="nf4", block=64, double=True, storage=torch.uint8):
    """A packed weight, its state's arrays by name, the dense weight and the original."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(
        weight,
        blocksize=block,
        quant_type=quant_type,
        compress_statistics=double,
        quant_storage=storage,
    )
    arrays = {name: tensor.numpy() for name, tensor in state.as_dict(packed=True).items()}
    dense = functional.dequantize_4bit(packed, state).numpy()
    packed = packed.view(torch.uint8) if storage == torch.bfloat16 else packed
    return packed.numpy(), arrays, dense, weight.numpy()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("shape", "block", "flat"),
    [((40, 192), 64, False), ((33, 70), 64, True), ((5, 1000), 128, True), ((3, 3), 64, True)],
)
def test_values_are_theirs(shape, block, flat, double):
    for quant_type in ("nf4", "fp4"):
        packed, state, dense, _ = saved(shape, quant_type, block, double)
        q = read_bitsandbytes(packed, state)
        assert (q.flat, q.format, q.shape) == (flat, quant_type, shape[::-1])
        tolerance = 0 if not double else 3e-7 * np.abs(dense).max()
        np.testing.assert_allclose(np.asarray(q.unbox()).T, dense, rtol=0, atol=tolerance)
    x = np.linspace(-1, 1, 2 * shape[1], dtype=np.float32).reshape(2, -1)
    np.testing.assert_allclose(
        quantized_matmul(jnp.asarray(x), q), x @ dense.T, rtol=1e-4, atol=1e-4
    )


def test_blocks_that_follow_ours_become_ours():
    packed, state, _, weight = saved((40, 192), double=False)
    ours = quantize(jnp.asarray(weight.T), QuantConfig(double_quant=False))
    read = read_bitsandbytes(packed, state)
    np.testing.assert_array_equal(read.codes, ours.codes)
    np.testing.assert_array_equal(read.scales, ours.scales)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
def test_any_storage_type(storage):
    packed, state, dense, _ = saved((16, 128), storage=storage)
    q = read_bitsandbytes(packed, state)
    np.testing.assert_allclose(np.asarray(q.unbox()).T, dense, rtol=0, atol=1e-6)


def described(state, **changes):
    (key,) = [k for k in state if k.startswith("quant_state")]
    told = json.loads(bytes(state[key])) | changes
    return state | {key: np.frombuffer(json.dumps(told).encode(), np.uint8)}


BROKEN = {
    "absmax": (lambda s: {k: v for k, v in s.items() if k != "absmax"}, r"w\.absmax is missing"),
    "description": (
        lambda s: {k: v for k, v in s.items() if not k.startswith("quant_state")},
        r"w\.quant_state\.bitsandbytes__nf4 is missing",
    ),
    "nested": (
        lambda s: {k: v for k, v in s.items() if k != "nested_absmax"},
        r"w\.nested_absmax is missing",
    ),
    "json": (
        lambda s: s | {"quant_state.bitsandbytes__nf4": np.zeros(3, np.uint8)},
        "not valid JSON",
    ),
    "type": (lambda s: described(s, quant_type="nf3"), "quant_type 'nf3' is not supported"),
    "block": (lambda s: described(s, blocksize=48.5), "blocksize 48.5 is not supported"),
    "shape": (lambda s: described(s, shape=[16]), r"shape \[16\] is not supported"),
    "bytes": (lambda s: described(s, shape=[32, 128]), "1024 bytes, but"),
    "blocks": (lambda s: s | {"absmax": s["absmax"][:-1]}, "31 values for 32 blocks"),
    "table": (lambda s: s | {"quant_map": s["quant_map"][::-1]}, "not the values"),
    "offset": (lambda s: described(s, nested_offset=None), "offset None is not supported"),
    "group": (lambda s: described(s, nested_blocksize=128), "groups of 128"),
    "nan": (
        lambda s: s | {"nested_absmax": s["nested_absmax"] * np.float32(np.nan)},
        "not finite",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(case):
    packed, state, _, _ = saved((16, 128))
    change, rule = BROKEN[case]
    with pytest.raises(InputError, match=rule) as caught:
        read_bitsandbytes(packed, change(state), name="w")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("w")

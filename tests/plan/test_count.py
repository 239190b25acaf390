"""FLOPs and kept bytes, against XLA's own count where it has one."""

import jax
import jax.numpy as jnp
import pytest

from lora_jax.plan._count import count


def counted(function, *shapes, dtype=jnp.float32):
    return count(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, dtype) for s in shapes)))


@pytest.mark.parametrize(
    "function, shapes",
    [
        (jnp.dot, [(8, 32), (32, 16)]),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), [(3, 8, 32), (3, 32, 16)]),
        (lambda a, b: jnp.dot(jnp.dot(a, b), b.T), [(8, 32), (32, 16)]),
        (jax.value_and_grad(lambda a, b: jnp.dot(a, b).var(), argnums=(0, 1)), [(8, 32), (32, 16)]),
        (
            lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID"),
            [(2, 4, 9, 9), (8, 4, 3, 3)],
        ),
    ],
)
def test_products_are_counted_as_xla_counts_them(function, shapes):
    """XLA counts each loop once, so what it is asked has none."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(function).lower(*arrays).compile()
    flops = compiled.cost_analysis()["flops"]
    ours = counted(function, *shapes).flops["float32"]
    # XLA counts additions of sums besides.
    assert ours <= flops <= 1.1 * ours


def layers(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]


def test_a_loop_counts_for_each_of_its_turns():
    assert counted(layers, (8, 16), (5, 16, 16)).flops == {"float32": 5 * 2 * 8 * 16 * 16}


def test_backward_is_twice_forward_and_remat_computes_again():
    def loss(body):
        def run(x, kernels):
            return jax.lax.scan(lambda x, k: (body(x, k), None), x, kernels)[0].sum()

        return jax.grad(run, argnums=1)

    def body(x, kernel):
        return jnp.tanh(x @ kernel)

    once = 5 * 2 * 8 * 16 * 16
    shapes = ((8, 16), (5, 16, 16))
    assert counted(loss(body), *shapes).flops["float32"] == 3 * once
    assert counted(loss(jax.checkpoint(body)), *shapes).flops["float32"] == 4 * once


def test_dtypes_are_kept_apart():
    def both(a, b):
        return a @ b, a.astype(jnp.float32) @ b.astype(jnp.float32)

    flops = counted(both, (8, 16), (16, 4), dtype=jnp.bfloat16).flops
    assert flops == {"bfloat16": 1024, "float32": 1024}


def test_custom_derivatives_count_what_is_computed_alone():
    @jax.custom_vjp
    def product(a, b):
        return a @ b

    product.defvjp(lambda a, b: (a @ b, (a, b)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    assert counted(product, (8, 16), (16, 4)).flops["float32"] == 1024
    grad = jax.grad(lambda a, b: product(a, b).sum(), argnums=(0, 1))
    assert counted(grad, (8, 16), (16, 4)).flops["float32"] == 3 * 1024


@pytest.mark.parametrize("order", [1, -1])
def test_of_branches_the_one_with_most_counts(order):
    def either(a, b):
        branches = [lambda a, b: a @ b, lambda a, b: jnp.zeros((8, 4))][::order]
        return jax.lax.cond(a[0, 0] > 0, *branches, a, b)

    assert counted(either, (8, 16), (16, 4)).flops["float32"] == 1024


def keeping(count):
    """x @ kernel, whose backward pass is given x so many times over."""

    @jax.custom_vjp
    def product(x, kernel):
        return x @ kernel

    def forward(x, kernel):
        return x @ kernel, ([x + i for i in range(count)], kernel)

    def backward(saved, g):
        xs, kernel = saved
        return g @ kernel.T, sum(xs).T @ g

    product.defvjp(forward, backward)
    return product


def gradient(body):
    def loss(x, kernels):
        return jax.lax.scan(lambda x, k: (body(x, k), None), x, kernels)[0].sum()

    return jax.grad(loss, argnums=(0, 1))


CARRY = 4 * 8 * 16
"""Bytes of the carry of a loop over (5, 16, 16) kernels."""


@pytest.mark.parametrize("times", [1, 3])
def test_what_the_forward_pass_keeps(times):
    kept = counted(gradient(keeping(times)), (8, 16), (5, 16, 16)).kept
    assert kept == times * 5 * CARRY
    remat = gradient(jax.checkpoint(keeping(times)))
    assert counted(remat, (8, 16), (5, 16, 16)).kept == 5 * CARRY


def test_what_one_loop_keeps_inside_another():
    """One turn of the outer loop at a time."""

    def accumulated(xs, kernels):
        return jax.lax.map(lambda x: gradient(keeping(2))(x, kernels), xs)

    assert counted(accumulated, (3, 8, 16), (5, 16, 16)).kept == 2 * 5 * CARRY


def test_what_is_sent_to_the_host_is_counted_there():
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["x"],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def body(x, kernel):
        x = jax.ad_checkpoint.checkpoint_name(x, "x")
        return jnp.tanh(jnp.sin(x) @ kernel), None

    def loss(x, kernels):
        return jax.lax.scan(jax.checkpoint(body, policy=policy), x, kernels)[0].sum()

    found = counted(jax.grad(loss), (8, 16), (5, 16, 16))
    assert (found.kept, found.kept_on_host) == (0, 5 * 4 * 8 * 16)

"""Plans for machines that are not here, where their compilers are installed."""

import pytest

from lora_jax.plan import plan

pytestmark = pytest.mark.slow


def check_bounds(made):
    links = {"links"} if made.target.count > 1 else set()
    assert set(made.bounds) == {"compute", "memory"} | links and made.flops["bfloat16"] > 1e6


@pytest.mark.parametrize("target", ["v5e:4x4", "v4:2x2x1", "v5p:2x2x1", "v6e:1x1"])
def test_a_tpu(run_file, target):
    pytest.importorskip("libtpu")
    made = plan(run_file, target, ["--model.dtype", "bfloat16"])
    assert made.fits and made.traffic is not None
    assert made.owners["base"] <= made.total <= 1e9
    check_bounds(made)


def test_what_is_offloaded_is_on_the_host(run_file):
    pytest.importorskip("libtpu")
    words = ["--model.dtype", "bfloat16", "--model.remat", "offload"]
    made = plan(run_file, "v5e:1x1", [*words, "--train.offload_optimizer", "true"])
    stays = plan(run_file, "v5e:1x1", words)
    assert made.owners["optimizer"] < 100 < stays.owners["optimizer"]
    assert made.host >= stays.host + stays.owners["optimizer"] - 100
    assert made.owners["activations"] == 0 < stays.host


def test_a_tpu_refuses_what_it_cannot_hold(run_file):
    pytest.importorskip("libtpu")
    large = ["--train.batch_size", "65536", "--model.remat", "everything"]
    made = plan(run_file, "v5e:1x1", ["--model.dtype", "bfloat16", *large])
    assert not made.fits and made.refused and made.total > made.limit


@pytest.mark.parametrize("target", ["h200", "h100x8", "a100-40", "rtx4090"])
def test_a_gpu(run_file, target):
    pytest.importorskip("jax_plugins.xla_cuda13")
    made = plan(run_file, target, ["--model.dtype", "bfloat16"])
    assert made.fits and made.owners["base"] <= made.total <= 1e9
    check_bounds(made)

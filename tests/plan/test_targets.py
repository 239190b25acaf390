"""Names of machines, and the figures behind them."""

import pytest

from lora_jax import InputError
from lora_jax.plan import parse_target
from lora_jax.plan._targets import GPUS, TPUS, gpu_text, known


@pytest.mark.parametrize("name", known())
def test_known_names_are_read(name):
    target = parse_target(name)
    assert target.name == name and target.count >= 1 and target.device.memory > 1e9


@pytest.mark.parametrize(
    "name, platform, count",
    [
        ("h200x8", "cuda", 8),
        ("rtx4090", "cuda", 1),
        ("rtx4090x2", "cuda", 2),
        ("a100-40", "cuda", 1),
        ("v5e:4x4", "tpu", 16),
        ("v5p:4x4x4", "tpu", 64),
        ("v4:2x2x2", "tpu", 8),
        ("v6e:1x1", "tpu", 1),
        ("cpu", "cpu", 1),
    ],
)
def test_how_many_devices(name, platform, count):
    target = parse_target(name)
    assert (target.platform, target.count) == (platform, count)


@pytest.mark.parametrize(
    "name, message",
    [
        ("h20", r"unknown 'h20' \(did you mean 'h200'\?\); known: cpu, h200, .*v5e:16x16"),
        ("tpu", r"unknown 'tpu'"),
        ("", r"unknown ''"),
        ("h200x9", r"h200x9: a machine holds 1 to 8 GPUs, got 9"),
        ("h200x0", r"unknown 'h200x0' \(did you mean 'h200'\?\)"),
        ("v7x:2x2", r"unknown TPU 'v7x'"),
        ("v5e", r"v5e needs one of its topologies, none was given; as v5e:1x1, with one of 1x1"),
        ("v5e:3x3", r"got '3x3'; as v5e:1x1, with one of 1x1, 2x2, .*16x16"),
        ("v5p:4x4", r"v5p needs one of its topologies, got '4x4'"),
        ("v5e:4x4;rm", r"got '4x4;rm'"),
    ],
)
def test_wrong_names_are_refused(name, message):
    with pytest.raises(InputError, match=message) as error:
        parse_target(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", [*GPUS.values(), *(tpu.device for tpu in TPUS.values())])
def test_every_figure_has_a_source_and_a_sensible_size(device):
    assert device.source
    assert 15e9 < device.memory < 200e9
    assert 0.5e12 < device.bandwidth < 10e12
    assert 100e12 < device.bf16 < 3000e12 and device.f32 <= device.bf16
    assert 20e6 < device.cache < 300e6 and 10e9 < device.link < 1e12


def test_a_gpu_is_described_to_its_compiler():
    text = gpu_text(GPUS["h100"])
    assert "device_memory_size: 84942979072" in text
    assert "cuda_compute_capability {major: 9 minor: 0}" in text
    assert 'device_description_str: "NVIDIA H100 SXM 80 GB"' in text

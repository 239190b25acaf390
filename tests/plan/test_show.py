"""Plans in words and pictures."""

import dataclasses

import pytest

from lora_jax import InputError
from lora_jax.plan import draw, parse_target, show, show_found, show_grid
from lora_jax.plan._hlo import Collective


def test_a_plan_that_fits(make_plan):
    text = show(make_plan())
    assert "for NVIDIA GeForce RTX 4090; compiled by jax 0.12, not run" in text
    assert "4 × 2048 tokens a step, bfloat16, remat everything, adamw" in text
    assert "  activations    10.000 GB  ████" in text
    assert "  sum            17.100 GB  of 24.1: fits, 7.0 GB (29%) free" in text
    assert "bound: at least 0.605 s a step that trains on all its tokens (compute" in text
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in text
    assert "nothing between devices" in text


def test_a_plan_that_fits_only_in_more_than_jax_takes_by_default(make_plan):
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in show(make_plan(total=22_000_000_000))


def test_a_plan_that_does_not_fit(make_plan):
    text = show(make_plan(total=30_000_000_000))
    assert "of 24.1: does not fit, 5.9 GB too much" in text
    refused = show(make_plan(refused="too large", traffic=None))
    assert "does not fit, the compiler refuses it" in refused and "bound" not in refused


def test_several_devices_and_what_they_exchange(make_plan):
    between = [Collective("all-gather", "u8", 64, 2 * 10**9, 10**9, 10**8)]
    mesh = {"data": 4, "fsdp": 1, "sequence": 1, "tensor": 2}
    of_eight = make_plan(run={"mesh": mesh}, target=parse_target("h200x8"), host=10**9)
    text = show(dataclasses.replace(of_eight, collectives=[dataclasses.asdict(between[0])]))
    assert "for NVIDIA H200, each of 8 (data 4, tensor 2)" in text
    assert "64 all-gather of 2 GB u8 in all" in text and "links" in text
    assert "on the host     1.000 GB" in text


def test_no_bound_without_a_data_sheet(make_plan):
    assert "bound: none" in show(make_plan(target=parse_target("cpu")))


def test_what_a_search_found(make_plan):
    text = show_found((("--model.remat", "nothing"), make_plan()))
    assert text.startswith("it fits with --model.remat nothing\n\n") and "sum" in text
    assert "no change known here makes it fit" in show_found(None)


@pytest.fixture
def grid(make_plan):
    return [
        make_plan({"batch_size": batch, "max_length": seq}, total=batch * seq * 10**7)
        for batch in (1, 2)
        for seq in (512, 2048)
    ]


def test_a_grid(grid):
    assert show_grid(grid).splitlines()[1:] == [
        "             512      2048",
        "     1     5.12     20.48 ",
        "     2    10.24     40.96!",
    ]


def test_pictures(grid, make_plan, tmp_path):
    for name, plans in (("one.png", [make_plan()]), ("many.png", grid)):
        draw(plans, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="cannot write"):
        draw(grid, tmp_path / "one.png" / "two.png")

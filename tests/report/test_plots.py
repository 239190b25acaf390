"""Figures for notebooks: what they show, and what they refuse."""

import io

import numpy as np
import pytest

from lora_jax import InputError
from lora_jax.report import (
    plot_block_sizes,
    plot_codebook,
    plot_losses,
    plot_matrices,
    plot_quantization_error,
    plot_rank_loss,
    plot_singular_values,
    plot_table,
)

FIGURES = {
    "losses": lambda: plot_losses({"a": ([1, 2], [3.0, 2.0]), "b": ([2], [2.5])}),
    "ranks": lambda: plot_rank_loss({"cut": {1: 3.0, 4: 2.0}}, levels={"before": 4.0}),
    "singular values": lambda: plot_singular_values({"delta": np.array([3.0, 1.0, 1e-9])}),
    "matrices": lambda: plot_matrices({"A": np.eye(6, 2), "B": -np.eye(2, 9)}, title="thin"),
    "table": lambda: plot_table({"x": {"a": 0.1, "b": 0.9}}, title="accuracy"),
    "codebook": lambda: plot_codebook({"even": [-1.0, 0.0, 1.0]}, np.linspace(-1, 1, 9)),
    "errors": lambda: plot_quantization_error({"nf4": {"normal": 0.1}, "int4": {"real": 0.2}}),
    "block sizes": lambda: plot_block_sizes({"nf4": {32: (5.0, 0.08), 64: (4.5, 0.09)}}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_written_as_a_picture(name):
    file = io.BytesIO()
    FIGURES[name]().savefig(file, format="png", dpi=20)
    assert file.getvalue().startswith(b"\x89PNG")


def points(figure):
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}


def test_lines_hold_the_numbers_given():
    assert points(FIGURES["losses"]()) == {"a": [[1, 3], [2, 2]], "b": [[2, 2.5]]}
    assert points(plot_rank_loss({"cut": {4: 2.0, 1: 3.0}})) == {"cut": [[1, 3], [4, 2]]}
    assert points(FIGURES["block sizes"]()) == {"nf4": [[5, 8], [4.5, 9]]}


def test_rounding_among_singular_values_is_left_out():
    (line,) = FIGURES["singular values"]().axes[0].lines
    np.testing.assert_array_equal(line.get_ydata(), [3, 1, np.nan])


def test_cells_of_all_matrices_have_one_size():
    figure = FIGURES["matrices"]()
    inches = figure.get_size_inches()
    sizes = [axes.get_position().size * inches for axes in figure.axes]
    cells = [size / axes.images[0].get_size()[::-1]
             for size, axes in zip(sizes, figure.axes, strict=True)]  # fmt: skip
    np.testing.assert_allclose(cells, cells[0][0])


def test_colours_are_even_around_zero():
    shown = plot_matrices({"m": np.array([[-1.0, 3.0]])}).axes[0].images[0]
    assert shown.get_clim() == (-3, 3)


def test_bars_are_per_cent_and_stand_in_groups():
    figure = FIGURES["errors"]()
    heights = [float(bar.get_height()) for bar in figure.axes[0].patches]
    np.testing.assert_array_equal(heights, [10, np.nan, np.nan, 20])  # normal, then real


def test_a_table_shows_its_numbers():
    texts = [text.get_text() for text in FIGURES["table"]().axes[0].texts]
    assert texts == ["0.10", "0.90"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plot_losses({}), "nothing to draw"),
        (lambda: plot_losses({"a": ([1, 2], [3.0])}), "a has 2 steps and 1 losses"),
        (lambda: plot_rank_loss({"a": {}}), "nothing to draw"),
        (lambda: plot_table({"a": {"x": 1.0}, "b": {"y": 1.0}}, title=""), "row b has"),
        (lambda: plot_codebook({}), "nothing to draw"),
    ],
)
def test_what_cannot_be_drawn_is_told(call, words):
    with pytest.raises(InputError, match=words):
        call()

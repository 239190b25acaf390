from collections import defaultdict

import flax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import combine, partition
from lora_jax._tree import (
    is_below,
    layer_paths,
    leaves_with_path,
    map_with_path,
    tree_from_paths,
)

names = st.text("abc", min_size=1, max_size=2)
trees = st.recursive(
    st.dictionaries(names, st.integers(), min_size=1, max_size=3),
    lambda inner: st.dictionaries(names, st.integers() | inner, min_size=1, max_size=3),
    max_leaves=8,
)
few = settings(max_examples=50)


@few
@given(trees)
def test_paths_and_tree_are_the_same_thing(tree):
    assert tree_from_paths(dict(leaves_with_path(tree))) == tree


@few
@given(trees, st.data())
def test_combine_undoes_partition(tree, data):
    paths = [path for path, _ in leaves_with_path(tree)]
    chosen = data.draw(st.sets(st.sampled_from(paths)))
    selected, rest = partition(tree, lambda path: path in chosen)
    assert {path for path, _ in leaves_with_path(selected)} == chosen
    assert {path for path, _ in leaves_with_path(rest)} == set(paths) - chosen
    assert combine(rest, selected) == combine(selected, rest) == tree


@few
@given(trees)
def test_a_mask_tree_and_a_function_choose_the_same(tree):
    def even(path):
        return len(path) % 4 == 1

    mask = map_with_path(lambda path, _: even(path), tree)
    assert partition(tree, mask) == partition(tree, even)


def test_combine_takes_the_overlay_where_both_have_a_leaf():
    base, overlay = {"a": {"kernel": 1, "bias": 2}}, {"a": {"kernel": 3}}
    assert combine(base, overlay) == {"a": {"kernel": 3, "bias": 2}}
    assert base == {"a": {"kernel": 1, "bias": 2}}


@pytest.mark.parametrize(
    ("base", "overlay"),
    [({"a": {"b": 1}}, {"a": {"b": {"c": 2}}}), ({"a": {"b": {}}}, {"a": {"b": 1}})],
)
def test_combine_names_the_path_where_a_leaf_meets_a_subtree(base, overlay):
    with pytest.raises(ValueError, match="a/b is a leaf in one tree"):
        combine(base, overlay)


def test_combine_copies_no_leaf():
    leaf = object()
    assert combine({"a": {"kernel": leaf}}, {"b": {"lora_A": 1}})["a"]["kernel"] is leaf


def test_layer_paths_number_the_stack():
    assert layer_paths("layers/mlp/up", "layers", 2) == ["layers/0/mlp/up", "layers/1/mlp/up"]
    assert layer_paths("a/blocks/mlp", "a/blocks", 1) == ["a/blocks/0/mlp"]
    assert layer_paths("lm_head", None, 1) == ["lm_head"]


@pytest.mark.parametrize("mask", [{"a": {"x": True}}, {"a": {"x": True, "y": True, "z": False}}])
def test_a_mask_of_another_structure_is_refused(mask):
    with pytest.raises(AssertionError):
        partition({"a": {"x": 1, "y": 2}}, mask)


def test_a_map_keeps_mappings_as_they_are():
    tree = flax.core.freeze({"a": {"b": 1, "none": {}}, "c": 2})
    mapped = map_with_path(lambda path, leaf: (path, leaf), tree)
    assert mapped == flax.core.freeze({"a": {"b": ("a/b", 1), "none": {}}, "c": ("c", 2)})
    assert type(mapped) is type(tree)
    assert map_with_path(lambda path, _: path, defaultdict(dict, a=1)) == {"a": "a"}


def test_everything_lies_below_the_root():
    assert is_below("q/kernel", "") and is_below("q", "q") and not is_below("q_proj", "q")
    assert layer_paths("q_proj/kernel", "", 2) == ["0/q_proj/kernel", "1/q_proj/kernel"]
    assert layer_paths("layers", "layers", 1) == ["layers/0"]

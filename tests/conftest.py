"""What every test runs under: shapes checked, warnings are errors, one compilation cache."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Set before JAX is imported, and inherited by the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping  # noqa: E402

# An int is a float, as every type checker but plain beartype has it.
jaxtyping.install_import_hook(
    "lora_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    skip = pytest.mark.skip(reason="slow; run with --all")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of models and data made by others, named by LORA_JAX_TEST_DATA."""
    name = os.environ.get("LORA_JAX_TEST_DATA")
    if not name:
        pytest.skip("needs outside data: set LORA_JAX_TEST_DATA to their folder")
    folder = Path(name)
    if not folder.is_dir():
        pytest.fail(f"LORA_JAX_TEST_DATA={name} is not a folder")
    return folder

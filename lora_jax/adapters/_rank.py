"""What ranks an adapter really uses: the singular values of its deltas, read from its file."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .._config import LoraConfig
from .._errors import InputError
from .._files import open_tensors
from ..lora import OUTPUT_HEADS
from ._experts import NESTING, unpack
from ._peft import PREFIX, read_config, weights_file

ENERGY = 0.99
"""Share of the squared singular values that the suggested rank keeps."""
_PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
)


@dataclasses.dataclass(frozen=True)
class DeltaSpectrum:
    """The delta `scaling·A·B` of one module.

    Args:
        module: Its dotted path; of an expert with its number behind it.
        rank: The rank it was given.
        values: Its `rank` singular values, largest first, float64.
    """

    module: str
    rank: int
    values: np.ndarray

    @property
    def norm(self) -> float:
        """Frobenius norm of the delta."""
        return float(np.linalg.norm(self.values))

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values' shares: between 1 and the rank, or 0.

        Source: Roy and Vetterli 2007, "The effective rank", definition 1.
        """
        total = self.values.sum()
        if not total:
            return 0.0
        shares = self.values[self.values > 0] / total
        return float(np.exp(-(shares * np.log(shares)).sum()))

    @property
    def suggested_rank(self) -> int:
        """The least rank that keeps 99 % of the squared norm."""
        energy = np.cumsum(self.values**2)
        if not energy[-1]:
            return 0
        return int(np.searchsorted(energy, ENERGY * energy[-1]) + 1)


def delta_spectra(directory: str | Path) -> list[DeltaSpectrum]:
    """The singular values of every delta in an adapter's directory, without its base.

    Biases, on B or of the base, are no part of a delta's matrix and are left out.

    Computed in float64 from the two factors: those of the small `R_A·R_Bᵀ` of their QR
    decompositions.

    Args:
        directory: An adapter that this library or PEFT wrote, for any model.

    Raises:
        InputError: for a missing or broken file, a pickle, or an adapter without such pairs.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from lora_jax import LoraConfig
        >>> from lora_jax.adapters import save_adapter
        >>> one = {"lora_A": jnp.eye(4, 2), "lora_B": jnp.eye(2, 6), "lora_scaling": jnp.float32(3)}
        >>> config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"])
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_adapter(directory, {"q_proj": one}, config)
        ...     (found,) = delta_spectra(directory)
        >>> found.module, found.values.tolist(), round(found.effective_rank, 6)
        ('q_proj', [3.0, 3.0], 2.0)
    """
    directory = Path(directory)
    config = read_config(directory)
    spectra = []
    with open_tensors(weights_file(directory)) as file:
        keys = set(file.keys())
        as_listed = NESTING.items() <= (file.metadata() or {}).items()
        for key in sorted(keys, key=_natural):
            for end_a, end_b in _PAIRS:
                other = key.removesuffix(end_a) + end_b
                if not key.endswith(end_a) or other not in keys:
                    continue
                module = key.removesuffix(end_a).removeprefix(PREFIX)
                if module in OUTPUT_HEADS and config.ensure_weight_tying and _has_embedding(keys):
                    continue  # the same factors once more
                a, b = (_matrix(file.get_tensor(name)) for name in (key, other))
                _check_pair(f"{directory}: {module}", a, b)
                for name, scaling, own_a, own_b in _matrices(module, a, b, config, as_listed):
                    values = scaling * _singular_values(own_a, own_b)
                    spectra.append(DeltaSpectrum(name, len(own_a), values))
    if not spectra:
        raise InputError(f"{directory}: its file holds no pair of lora_A and lora_B")
    return spectra


def _matrix(tensor: np.ndarray) -> np.ndarray:
    """Of a convolution A has the kernel's axes, and B ones of size 1."""
    return tensor.astype(np.float64).reshape(len(tensor), -1)


def _check_pair(where: str, a: np.ndarray, b: np.ndarray) -> None:
    """Refuse factors whose product there is not."""
    if len(a) != b.shape[1]:
        raise InputError(
            f"{where}: lora_A {a.shape} and lora_B {b.shape} have no rank in common; the file is"
            " damaged"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError(
            f"{where}: its numbers are not all finite; its training diverged, or the file is"
            " damaged"
        )


def _has_embedding(keys: set[str]) -> bool:
    return any(key.endswith(_PAIRS[1][0]) for key in keys)


def _matrices(
    module: str, a: np.ndarray, b: np.ndarray, config: LoraConfig, as_listed: bool
) -> Iterator[tuple[str, float, np.ndarray, np.ndarray]]:
    """Name, scaling and factors of a module, or of each expert of a parameter of it.

    Args:
        as_listed: Whether parameters are nested as the config lists them: the last is outermost.
    """
    owner = module.split(".base_layer")[0]
    parameters = [
        f"{owner}.{entry.rpartition('.')[2]}"
        for entry in config.target_parameters or []
        if f".{owner}.".endswith(f".{entry.rpartition('.')[0]}.".replace("..", "."))
    ]
    if as_listed and parameters:
        parameters = [parameters[-1 - module.count(".base_layer")]]
    elif not parameters or (module == owner and len(a) == config.rank(module)):
        if len(a) != config.rank(module):
            raise InputError(
                f"{module} has rank {len(a)} in the file, and {config.rank(module)} by the config"
                " beside it; take the two from one adapter"
            )
        yield module, config.scaling(module), a, b
        return
    own = {(config.rank(name), config.scaling(name)) for name in parameters}
    if len(own) > 1 or len(a) % min(own)[0]:
        raise InputError(
            f"{module}: the file does not say which of {', '.join(parameters)} this is, and the"
            " config gives them different ranks or alphas"
        )
    (rank, scaling), *_ = own
    experts = len(a) // rank
    factors = zip(*unpack(a, b, experts), strict=True)
    name = parameters[0] if len(parameters) == 1 else module
    for i, (own_a, own_b) in enumerate(factors):
        yield module if experts == 1 else f"{name}.{i}", scaling, own_a.T, own_b.T


def _singular_values(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Those of b·a for a (rank, d_in) and b (d_out, rank)."""
    r_a, r_b = (np.asarray(np.linalg.qr(x, mode="r")) for x in (a.T, b))
    values = np.linalg.svd(r_b @ r_a.T, compute_uv=False)
    # QR of fewer rows than columns leaves fewer values: the others are zero.
    return np.pad(values, (0, len(a) - len(values)))


def _natural(key: str) -> list[Any]:
    """Sorts layer 10 behind layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]

"""How a base is kept in four or eight bits: `QuantConfig`."""

import dataclasses
from typing import Literal, get_args

from ._errors import InputError, nearest

QuantFormat = Literal["nf4", "fp4", "int4", "int8"]
"""How one number is kept in four or eight bits."""


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How frozen weights are kept in four or eight bits.

    Args:
        format: `"nf4"` (Dettmers et al. 2023, appendix E), `"fp4"` (bitsandbytes' values),
            `"int4"` or `"int8"`.
        block_size: Weights along the contracted axis that share one absmax: an even number
            from 32 to 4096.
        double_quant: Keep the absmax values in 8 bits too (ibid., section 3).
        absmax_dtype: Type of absmax values that are not quantized again.
        zero_point: Let int4 cover a block's own range instead of -absmax to absmax.
        embedding: Format of the token embedding; None leaves it dense.
        head: Format of the output head, where it is not the embedding; None leaves it dense.

    Raises:
        InputError: for a value out of its range, or two that do not go together.

    Example:
        >>> QuantConfig(format="int4", block_size=128, zero_point=True).double_quant
        True
    """

    format: QuantFormat = "nf4"
    block_size: int = 64
    double_quant: bool = True
    absmax_dtype: Literal["float32", "bfloat16"] = "float32"
    zero_point: bool = False
    embedding: QuantFormat | None = None
    head: QuantFormat | None = None

    def __post_init__(self) -> None:
        known = get_args(QuantFormat)
        for name in ("format", "embedding", "head"):
            value = getattr(self, name)
            if value not in known and (value is not None or name == "format"):
                hint = nearest(str(value), known)
                raise InputError(
                    f"quant: {name} {value!r} is not supported{hint}; use {', '.join(known)}"
                )
        size = self.block_size
        if type(size) is not int or not 32 <= size <= 4096 or size % 2:
            raise InputError(
                f"quant: block_size must be an even number from 32 to 4096, got {size!r}"
            )
        for name in ("double_quant", "zero_point"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(
                    f"quant: {name} must be true or false, got {getattr(self, name)!r}"
                )
        if self.absmax_dtype not in ("float32", "bfloat16"):
            raise InputError(
                f"quant: absmax_dtype must be float32 or bfloat16, got {self.absmax_dtype!r}"
            )
        if self.double_quant and self.absmax_dtype != "float32":
            raise InputError(
                "quant: absmax_dtype says how absmax values are kept, and double_quant keeps them"
                " in 8 bits; set double_quant to false"
            )
        if self.zero_point and self.format != "int4":
            raise InputError(f"quant: zero_point goes with int4, not {self.format}; leave it out")

    def of(self, format: QuantFormat | None) -> "QuantConfig | None":
        """The same for another format, as the embedding or the head may have; None for None."""
        if format is None:
            return None
        return dataclasses.replace(
            self,
            format=format,
            zero_point=self.zero_point and format == "int4",
            embedding=None,
            head=None,
        )

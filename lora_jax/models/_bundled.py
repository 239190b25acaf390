"""The small base that comes with the package."""

from pathlib import Path


def bundled_model() -> Path:
    """Directory of the bundled base: a Llama of 3.8 million parameters that has read Python.

    It was pretrained by `experiments/pretrain_base/` on the standard library's source.

    Example:
        >>> bundled_model().name
        'bundled'
    """
    return Path(__file__).parent / "bundled"

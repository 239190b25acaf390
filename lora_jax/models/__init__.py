"""Decoders: their shape, loading, saving and generation."""

from ._attention import attention_path as attention_path
from ._axes import AXES as AXES
from ._axes import logical_axes as logical_axes
from ._bundled import bundled_model as bundled_model
from ._cache import init_cache as init_cache
from ._checkpoint import weight_norms as weight_norms
from ._config import ModelConfig as ModelConfig
from ._decoder import CausalLM as CausalLM
from ._formats import abstract_params as abstract_params
from ._formats import quantize_params as quantize_params
from ._generate import generate as generate
from ._grow import add_tokens as add_tokens
from ._grow import vocabulary_tables as vocabulary_tables
from ._load import NO_FLOAT16 as NO_FLOAT16
from ._load import Pretrained as Pretrained
from ._load import load_pretrained as load_pretrained
from ._load import load_without_weights as load_without_weights
from ._sampling import SamplingParams as SamplingParams
from ._save import save_pretrained as save_pretrained
from ._text import Completion as Completion
from ._text import StreamedText as StreamedText
from ._text import TokenLogprobs as TokenLogprobs
from ._text import generate_text as generate_text
from ._text import stream_text as stream_text

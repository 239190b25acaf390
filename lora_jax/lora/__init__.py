"""Low-rank adapters as trees: targets, factors, the delta, merging."""

from ._box import LoraParam as LoraParam
from ._box import box_adapters as box_adapters
from ._box import check_shapes as check_shapes
from ._init import init_adapter as init_adapter
from ._init import with_dropout as with_dropout
from ._layout import KernelLayout as KernelLayout
from ._layout import Layouts as Layouts
from ._layout import matrix_shape as matrix_shape
from ._layout import paths_of_layers as paths_of_layers
from ._layout import rule_for as rule_for
from ._linear import look_up_delta as look_up_delta
from ._linear import lora_delta as lora_delta
from ._linear import lora_linear as lora_linear
from ._merge import merge_adapter as merge_adapter
from ._merge import unmerge_adapter as unmerge_adapter
from ._targets import Target as Target
from ._targets import adapter_names as adapter_names
from ._targets import find_targets as find_targets
from ._targets import is_embedding as is_embedding
from ._targets import is_within as is_within
from ._targets import leaf_shape as leaf_shape
from ._targets import matched_targets as matched_targets
from ._targets import pattern_counts as pattern_counts
from ._targets import saved_modules as saved_modules
from ._targets import trainable_mask as trainable_mask

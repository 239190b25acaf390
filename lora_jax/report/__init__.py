"""What a config adapts, and what a run left, as pictures and words.

`report(params, config)` tells what would be adapted; all else reads a run's files and nothing else.
"""

from ..lora import TargetReport as TargetReport
from ..lora import target_report as target_report
from ._call import CallablePackage as CallablePackage
from ._figures import draw_loss as draw_loss
from ._markdown import write_report as write_report
from ._records import read_records as read_records
from ._sweep import draw_sweep as draw_sweep
from ._sweep import read_sweep as read_sweep
from ._sweep import sweep_table as sweep_table

"""What a run left, as pictures and words; it reads the run's files and nothing else."""

from ._figures import draw_loss as draw_loss
from ._markdown import write_report as write_report
from ._records import read_records as read_records
from ._sweep import draw_sweep as draw_sweep
from ._sweep import read_sweep as read_sweep
from ._sweep import sweep_table as sweep_table

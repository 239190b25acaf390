"""What a config adapts, what a run left and what numbers look like, in pictures and words.

`report(params, config)` tells what would be adapted; the rest reads a run's files, or draws numbers
at hand.
"""

from ..lora import TargetReport as TargetReport
from ..lora import target_report as target_report
from ._advice import advice as advice
from ._call import CallablePackage as CallablePackage
from ._compare import compare_runs as compare_runs
from ._plots import plot_losses as plot_losses
from ._plots import plot_matrices as plot_matrices
from ._plots import plot_rank_loss as plot_rank_loss
from ._plots import plot_singular_values as plot_singular_values
from ._plots import plot_table as plot_table
from ._quant_plots import plot_block_sizes as plot_block_sizes
from ._quant_plots import plot_codebook as plot_codebook
from ._quant_plots import plot_quantization_error as plot_quantization_error
from ._records import read_records as read_records
from ._report import write_report as write_report
from ._run import Run as Run
from ._run import read_run as read_run
from ._spectra import plot_spectra as plot_spectra
from ._spectra import spectra_table as spectra_table
from ._spectra import spectra_words as spectra_words
from ._sweep import draw_sweep as draw_sweep
from ._sweep import read_sweep as read_sweep
from ._sweep import sweep_table as sweep_table

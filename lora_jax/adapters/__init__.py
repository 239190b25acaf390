"""Adapters on disk, in PEFT's format, and several made into one."""

from ._bank import AdapterBank as AdapterBank
from ._load import load_adapter as load_adapter
from ._peft import read_config as read_config
from ._rank import DeltaSpectrum as DeltaSpectrum
from ._rank import delta_spectra as delta_spectra
from ._rule import CombinationType as CombinationType
from ._save import save_adapter as save_adapter
from ._weighted import weighted_adapter as weighted_adapter

"""Adapters on disk, in PEFT's format, several made into one, and starts that look at data."""

from ._bank import AdapterBank as AdapterBank
from ._bank import write_slot as write_slot
from ._corda import init_corda as init_corda
from ._eva import init_eva as init_eva
from ._load import load_adapter as load_adapter
from ._lora_ga import init_lora_ga as init_lora_ga
from ._notes import adapter_notes as adapter_notes
from ._notes import write_notes as write_notes
from ._peft import read_config as read_config
from ._rank import DeltaSpectrum as DeltaSpectrum
from ._rank import delta_spectra as delta_spectra
from ._rule import CombinationType as CombinationType
from ._save import save_adapter as save_adapter
from ._weighted import weighted_adapter as weighted_adapter

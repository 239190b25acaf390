"""Evaluation: held-out loss, answers that are numbers, lm-evaluation-harness."""

from ._answers import Accuracy as Accuracy
from ._answers import answer_rows as answer_rows
from ._harness import harness_model as harness_model
from ._harness import run_harness as run_harness
from ._loss import RowLosses as RowLosses
from ._loss import row_losses as row_losses
from ._model import TextModel as TextModel
from ._model import continue_texts as continue_texts
from ._model import cut_at as cut_at
from ._numbers import flexible_number as flexible_number
from ._numbers import strict_number as strict_number
from ._score import Score as Score
from ._score import Scorer as Scorer
from ._subject import HeldOutLosses as HeldOutLosses
from ._subject import Subject as Subject
from ._subject import measure_on as measure_on

"""Tasks that need no data from elsewhere: their questions are made by our own makers with fixed seeds.

    a task: questions() -> questions.py: tokens -> Answerer -> records of samples -> outcomes.py: figures
"""

from evaluation.own.arithmetic import ArithmeticTask
from evaluation.own.bits_per_byte import BitsPerByteTask
from evaluation.own.completion import CompletionTask
from evaluation.own.copying import CopyingTask
from evaluation.own.formats import FormatTask
from evaluation.own.needle import NeedleTask
from evaluation.own.stopping import StoppingTask
from evaluation.own.template import TemplateTask
from evaluation.task import OwnTask

_ALL: tuple[OwnTask, ...] = (
    BitsPerByteTask(), CompletionTask(), CopyingTask(), NeedleTask(), ArithmeticTask(), StoppingTask(), FormatTask(),
    TemplateTask(),
)  # fmt: skip
TASKS: dict[str, OwnTask] = {task.name: task for task in _ALL}
"""By name; all begin with "zero_"."""

"""The class of each task."""

from tasks.config import TaskName
from tasks.dpo import DPOTask
from tasks.language_model import LanguageModelTask
from tasks.task import Task

TASKS: dict[TaskName, type[Task]] = {"pretrain": LanguageModelTask, "sft": LanguageModelTask, "dpo": DPOTask}

"""The loop of a run, what is built before it, and what it reports. Only train_my_ddp.py imports this package.

trainer.py          the loop and a step of it
build.py            all of the following in order, and the dataclass that holds it
run_dir.py          the run directory, and the checkpoint in it to resume from
data.py             both sets and the tokenizer
build_model.py      the model with its first weights
export.py           what a checkpoint tells other programs
build_task.py       what turns a batch into a loss
dpo_reference.py    the reference of DPO
resume.py           a checkpoint's state into what was built
progress.py         where the run stands

describe.py         the lines that say what runs
records.py          these lines, config.yaml and the start record
report.py           lines and records of steps, validations, saves and the end
saves.py            when the loop saves, and what becomes of it
saving.py           what a rank writes of a checkpoint
"""

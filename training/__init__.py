"""The loop of a run, the parts that are built before it, and its reports. Only train_my_ddp.py imports this package.
(config.py is for everybody: it is plain data.)

config.py           options of the run and of the machine, and the whole configuration
trainer.py          the loop and its step
build.py            builds all of the following in order, and holds it
run_dir.py          the run directory, and the checkpoint in it to resume from
data.py             both sets and the tokenizer
batch.py            the batch size, if no flag gives it
build_model.py      the model with its first weights
pipeline.py         the stages of a pipeline
export.py           information for other programs in a checkpoint
build_task.py       the task, which turns a batch into a loss
dpo_reference.py    the reference of DPO
resume.py           restores a checkpoint's state
progress.py         the run's position

describe.py         the lines that describe the run at its start
records.py          these lines, config.yaml and the start record
report.py           lines and records of steps, validations, saves and the end
saves.py            the loop's saves and their outcome
saving.py           a rank's share of a checkpoint
stopping.py         requests to stop, and the ranks' looks for them
evaluation.py       evaluations by tasks, after a save
eval_rounds.py      the ranks' common work on one
eval_folder.py      its folder in the run directory
samples.py          texts that the model writes after a validation
rates.py            a warning of learning rates that ruin a large model
meter.py            figures of the steps since the last record
energy.py           counters of the run's energy
profile_steps.py    traces of some steps
summary.py          the last lines of a run
launching.py        --nproc: the command on several processes of this machine
"""

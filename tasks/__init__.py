"""What is trained: each task turns a batch into (loss_sum, count, metrics).

config.py          what is known of each task before anything is built, and its options
task.py            what the loop sees of a task
registry.py        the class of each task
language_model.py  pretraining and SFT
dpo.py             DPO
reference.py       log-probabilities under DPO's reference model
"""

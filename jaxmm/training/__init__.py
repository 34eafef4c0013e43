"""Training: config, state, step and loop.

config.py     what an experiment says, and overrides from the command line
optimizer.py  optax by regular expressions over parameter paths
state.py      the train state: made on its mesh, saved, restored
step.py       one step
metrics.py    numbers to JSON lines and TensorBoard, the progress line
inputs.py     tokenizer, batches, a frozen codec's weights
flops.py      model FLOPs of a step, peak of the devices
loop.py       steps, checkpoints, samples, the final report
report.py     the numbers of finished and unfinished runs, and a table of them
curves.py     the same as a picture
"""

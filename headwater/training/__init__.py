"""One plain training loop, its record, and retraining on subsets.

A run is a pure function of the weights of its examples (`run`), made of pure optimizer steps (`optimizers`). Its
record, the `trajectory`, holds what attribution later needs: optimizer and hyperparameters, learning rates, the order
of examples, stages, checkpoints; loops of one's own are recorded by `record`. Retraining on subsets (`loop`, `bank`)
and under changed weights (`retraining`, `verify`) gives the ground truth that attributions are judged by.
"""

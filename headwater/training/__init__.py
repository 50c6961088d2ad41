"""One plain training loop, its checkpoints, and retraining on subsets.

The loop records what attribution later needs: optimizer and hyperparameters, learning rates, the
order of examples. Retraining on subsets gives the ground truth that attributions are judged by.
"""

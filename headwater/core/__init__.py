"""The shared artifact, and the values that verbs exchange.

A `Task` binds a model to its loss, `capture` sweeps once over the data, and what it gathers becomes
a fit: layerwise curvature and an index of per-example gradients, stored with a manifest of the
model, data and options that made them. Results such as `Scores` are defined here as well, so that
verbs can hand them to each other without importing one another. No model library is imported.
"""

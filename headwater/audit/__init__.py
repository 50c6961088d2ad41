"""Audit: what is wrong with the data or the model, each finding with its evidence."""

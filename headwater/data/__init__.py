"""Datasets as examples with stable ids, splits and metadata columns.

Readers for a person's own JSONL, CSV, Parquet and text files, and for the small real datasets that
the demo, the tests and the studies use. Columns that a dataset carries travel into the results.
"""

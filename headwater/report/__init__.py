"""Show saved results: tables in the terminal and self-contained HTML pages.

A report shows only what a saved result contains, so that what is on the page can be recomputed.
"""

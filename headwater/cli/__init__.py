"""The command line: one file per command, and each body is parse, call, show.

Commands load on first use, so that `headwater --help` answers at once: nothing heavy may be
imported at the top of this package.
"""

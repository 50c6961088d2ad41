"""A local page over a run folder: the saved results to read, and the questions of the command line to ask.

`headwater serve` starts it. The server answers on this machine only, refuses requests of other pages, and computes
nothing itself: jobs wait in a queue (`jobs`) and run one after another in a child process (`engine`, `worker`), so
that the page stays quick and a job that is killed goes on.
"""

"""What pages show of a run folder, worked out from saved results alone: pure functions that give what JSON has.

The page that `headwater serve` opens, the file that `headwater report` writes, the page of a trace and the cards of a
notebook show these views and nothing else. Python decides numbers, rounding, excerpts and colours, and makes text
harmless; whoever shows a view only lays it out.
"""

"""Values of the flags that choose how data is read and planned; imports nothing, so that --help is quick."""

from __future__ import annotations

READERS = ("pyav", "decord")  # the first is the default, since benchmarks/decode.py measures it faster
MISSING_CAPTIONS = ("empty", "refuse")  # what a run does about rows without a caption
GRIDS = ("ratios", "exact")  # sizes of buckets: a table of aspect ratios, or those of the data
# mixed: balance the ranks and keep each step as varied as the data; strict: balance alone; none: random order
BALANCES = ("mixed", "strict", "none")
SAMPLINGS = ("random", "uniform", "head")  # how the start of a clip is chosen
NEXT_EPOCH, AT_ONCE = ACCEPTED = ("next_epoch", "now")  # when a run goes on with changed data

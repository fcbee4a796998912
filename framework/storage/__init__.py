"""Where a frozen weight rests and how it is fetched: the FP8 codec and the managed layers."""

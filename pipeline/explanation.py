"""Where a network looked: maps that add up to the stitched model's own score, window by window."""

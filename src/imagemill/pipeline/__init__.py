"""From an image to its row, in one worker. Read `run_shards` first."""

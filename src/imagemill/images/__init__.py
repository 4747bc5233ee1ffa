"""Pictures: bytes to pixels, and pixels to batches."""

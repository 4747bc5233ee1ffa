"""Images: bytes to pixels, and pixels to batches."""

DECODER = "pillow+simplejpeg/2"
"""Names the way from bytes to pixels in the answer id; the number rises when that way changes an
answer.
"""

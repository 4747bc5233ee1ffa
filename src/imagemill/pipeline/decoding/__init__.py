"""Images: bytes to pixels, and pixels to batches."""

try:
    from imagemill.pipeline.decoding._resample import resample_part as resample_part

    _RESAMPLER = ""
except ImportError:  # no compiler where it was installed: a few pixels differ by a level
    _RESAMPLER = "+pillow-resize"

DECODER = f"pillow+simplejpeg/3{_RESAMPLER}"
"""Names the way from bytes to pixels in the answer id; the number rises when that way changes an
answer.
"""

"""Images: bytes to pixels, and pixels to batches."""

try:
    from imagemill.pipeline.decoding._resample import resample_part as resample_part
except ImportError:  # no compiler where it was installed, or an older build
    resample_part = None  # type: ignore[assignment]

DECODER = f"pillow+simplejpeg/3{'' if resample_part is not None else '+pillow-resize'}"
"""Names the way from bytes to pixels in the answer id; the number rises when that way changes an
answer. Without the vectorised resampler a few pixels differ by a level.
"""

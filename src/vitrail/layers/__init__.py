"""Building blocks shared by the model families; they know torch and nothing else of this package.

Axes: b batch, t time, h height, w width, n tokens, c channels, k heads, d head dim.
"""

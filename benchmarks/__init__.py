"""Measurements side by side with other libraries; both sides always run in the same process and environment."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # idle OpenMP threads that spin turn any other process into seconds of noise

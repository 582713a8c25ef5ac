"""Comparisons over many runs."""

from vitrail.studies.grid import Cell, Grid, run_grid

__all__ = ["Cell", "Grid", "run_grid"]

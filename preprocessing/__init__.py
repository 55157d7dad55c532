"""Millimetres, grids and intensities: what a scan is, and how it becomes what a network sees and back."""

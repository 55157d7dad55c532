"""Whole slides: tiles to features, features to a model, a model to predictions and heatmaps that agree."""

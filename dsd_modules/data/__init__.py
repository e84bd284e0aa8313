"""Data for the recipe: a synthetic corpus, and mixing any corpus into LibriMix's shape."""

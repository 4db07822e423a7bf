"""Measures of samples: judges, distances, and quality against the number of steps."""

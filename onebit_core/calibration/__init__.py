"""Calibration text, its sampling, and the statistics recorded on it."""

"""Measurements: everything is a ratio of two figures taken in the same run on the same machine."""

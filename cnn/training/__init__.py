"""Runs: how they are trained, what they keep, and how they are used afterwards."""

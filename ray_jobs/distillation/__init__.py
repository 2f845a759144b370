"""Divergences, student construction, teacher targets. Runs without Ray."""

"""Measurements behind the figures in docs/; each page beside its script has command, hardware, date and versions."""

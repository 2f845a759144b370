"""raystill: teach a small language model what a large one knows, on Ray, and prove it."""

__version__ = "0.1.0"

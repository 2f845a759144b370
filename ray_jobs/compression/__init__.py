"""Quantization schemes, exporters, runtimes and the measuring bench. Free of Ray."""

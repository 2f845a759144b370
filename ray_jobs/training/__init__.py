"""Model loading, adapters, batches, the one training loop, memory limits. Runs without Ray."""

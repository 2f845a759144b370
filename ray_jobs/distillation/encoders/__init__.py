"""Encoders as teachers and students: masked tokens, sentence embeddings, classes. Runs without Ray."""

"""Endpoints: teacher and student behind one OpenAI-compatible API on Ray Serve."""

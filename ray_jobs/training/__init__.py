"""Model loading, adapters, batches, the one training loop, memory limits. Runs without Ray."""

import logging

# bitsandbytes says at its import that an optional kernel package for CPUs is missing; nothing here needs it
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

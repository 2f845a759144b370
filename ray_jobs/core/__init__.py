"""What every job stands on: config, records, run folder, models, cluster, errors, progress."""

import logging

# transformers imports DeepSpeed to save a model, which then says on stdout, where --json answers, that it found no GPU
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)

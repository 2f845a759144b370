"""What every job stands on: config, records, run folder, models, cluster, errors, progress."""

"""Search spaces for Ray Tune: functions returning a `param_space`, each range with its source."""

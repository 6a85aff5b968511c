"""How any model looks at many records: passes, workers, the pool of devices, the score cache."""

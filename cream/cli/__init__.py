"""Command lines: flags, messages, signals, names, and the checks made before anything is spent."""

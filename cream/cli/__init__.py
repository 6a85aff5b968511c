"""Command lines: flags, messages, signals, names, and checks of disk and memory before the work starts."""

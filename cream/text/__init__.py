"""Text to token ids: chat templates, and the prompts that stages add."""

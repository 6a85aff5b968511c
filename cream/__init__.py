"""CREAM and its sister methods: language models that improve themselves without human preference labels."""

__version__ = "0.1.0"

"""What a loop or any outputs show: numbers, figures, and a page with both."""

"""Evaluation: tasks, the answer that a response gives (answers), its grade, how sure the numbers are (statistics)."""

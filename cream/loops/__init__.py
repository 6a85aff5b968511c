"""The loop as data: a recipe file and the stage commands that it stands for."""

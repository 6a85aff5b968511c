"""The tiny world: arithmetic word problems, and a small language model that solves some of them."""

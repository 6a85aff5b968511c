"""The tiny world: a small world of arithmetic word problems and a language model that is half good at them."""

"""Training: one loop on accelerate (loop.py), one file in stages/ per method, options.py for the flags they share."""

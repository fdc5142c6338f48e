"""What every Python process of a test run does first: this folder is on their PYTHONPATH.

A run starts hundreds of them, and most of what each does is to import Ray, torch and transformers. Python looks through
all that is there for garbage after every 700 new objects, of which none is garbage: a tenth of the run's CPU time.
"""

import gc

gc.set_threshold(100_000, 50, 1000)

"""rrhf-bench: which alignment method gives how much reward, at what cost, and is the difference real?"""

__version__ = "0.1.0"

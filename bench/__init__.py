"""Research programs, run from a checkout: ``python -m bench NAME --results DIR``."""

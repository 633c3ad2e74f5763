"""What a test changes must be seen by functions that remember."""


def forget(*modules):
    """Empties the caches of all functions of modules."""
    for module in modules:
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()

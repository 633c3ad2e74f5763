"""Counts work, as a test of what grows with what needs no clock."""

import sys


def steps(call):
    """Lines of Python that ``call()`` runs, and calls of functions, those in C among them."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("line", "call", "c_call")
        return note

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before[1])
        sys.settrace(before[0])
    return count

"""Processes that train together, on this machine."""

import socket
from contextlib import contextmanager
from multiprocessing.connection import wait


@contextmanager
def free_port():
    """A port that nobody else is given as long as the context lasts."""
    with socket.socket() as kept:
        # Bound and not listened to, it may be bound once more, by who asks for this very port.
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        yield kept.getsockname()[1]


def run_together(processes):
    """Starts processes and sees them succeed; if one fails, the others would wait for ever."""
    for process in processes:
        process.start()
    left = set(processes)
    while left:
        ended = wait([process.sentinel for process in left])
        for process in [process for process in left if process.sentinel in ended]:
            process.join()
            left.remove(process)
            if process.exitcode:
                for other in left:
                    other.kill()
    assert [process.exitcode for process in processes] == [0] * len(processes)

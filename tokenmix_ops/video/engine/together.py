"""What processes do together: the first one decides, and what goes wrong on one ends all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import distributed

Result = TypeVar("Result")


@contextmanager
def raised_on_all() -> Iterator[None]:
    """Has an OSError or ValueError within it, on some process, raised on all, once all are through.

    Nothing within it may wait for another process.
    """
    own: OSError | ValueError | None = None
    try:
        yield
    except (OSError, ValueError) as error:
        own = error
    # As plain errors: not every kind of them can be sent.
    kind = OSError if isinstance(own, OSError) else ValueError
    for found in _of_all(None if own is None else kind(str(own))):
        if found is not None:
            raise own or found


def by_first(action: Callable[[], Result]) -> Result:
    """Has the first process do something, and gives its result to all.

    An OSError or ValueError is raised on all.
    """
    found: list[Any] = [None]
    with raised_on_all():
        if not _several() or distributed.get_rank() == 0:
            found = [action()]
    if _several():
        distributed.broadcast_object_list(found, src=0)
    result: Result = found[0]
    return result


def _of_all(value: Any) -> list[Any]:
    if not _several():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()

"""Unpickles only containers, strings and numbers, so that a file cannot run code."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

# The opcodes that build dicts, lists, tuples, sets, strings and numbers, in any protocol.
_PLAIN = {
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2"),
    *("LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_SET", "ADDITEMS", "FROZENSET"),
}
_TO_MARK = ("POP_MARK", "SETITEMS", "APPENDS", "ADDITEMS")
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"requests {module}.{name}")


def load_plain(path: Path) -> Any:
    """Load a pickle of plain containers, strings and numbers, also from Python 2.

    Never runs code from the file. Raises ValueError if it is damaged or refers to any class,
    function or persistent object.
    """
    content = path.read_bytes()
    keys = _Keys()
    try:
        for opcode, argument, place in _opcodes(content):
            if opcode.name not in _PLAIN:
                asked = f", {argument}" if isinstance(argument, str) else ""
                raise ValueError(
                    f"byte {place} would run code or load a class ({opcode.name}{asked}); expected "
                    "only plain containers, strings and numbers"
                )
            # The unpickler would allocate an array of this size.
            if "PUT" in opcode.name and not 0 <= int(argument or 0) <= len(content):
                raise ValueError(f"byte {place} has the memo index {argument}, beyond the file")
            keys.follow(opcode.name, argument)
        return _Plain(io.BytesIO(content), encoding="utf-8").load()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} holds text that is not UTF-8; convert it") from error
    # A damaged pickle can raise anything.
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a plain pickle: {error}") from error


class _Keys:
    """Simulates a pickle's stack, to refuse tuples and sets as keys and as items of sets.

    Hashing them takes time and recursion in proportion to their expanded size and nesting, so a
    small file could crash the process.
    """

    def __init__(self) -> None:
        self.stack: list[bool | None] = []
        """Whether each object is nested; None for a mark."""
        self.memo: dict[int, bool | None] = {}

    def follow(self, name: str, argument: Any) -> None:
        """Simulate one opcode; raise ValueError for a nested key, and IndexError or KeyError for an
        impossible step."""
        if name in ("PROTO", "FRAME", "STOP"):
            return
        if name == "MARK":
            self.stack.append(None)
        elif name in ("POP", "APPEND"):
            self.stack.pop()
        elif name == "SETITEM":
            self.stack.pop()
            self._refuse([self.stack.pop()])
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name.endswith("PUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif name.endswith("GET"):
            self.stack.append(self.memo[int(argument)])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            del self.stack[-int(name[-1]) :]
            self.stack.append(True)
        elif name in ("TUPLE", "LIST", "DICT", "FROZENSET", *_TO_MARK):
            items = self._to_mark()
            if name in ("DICT", "SETITEMS"):
                self._refuse(items[::2])
            elif name in ("FROZENSET", "ADDITEMS"):
                self._refuse(items)
            if name not in _TO_MARK:
                self.stack.append(name in ("TUPLE", "FROZENSET"))
        else:
            self.stack.append(False)

    def _to_mark(self) -> list[bool | None]:
        place = len(self.stack) - 1
        while self.stack[place] is not None:
            place -= 1
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _refuse(self, keys: Iterable[bool | None]) -> None:
        if any(keys):
            raise ValueError("its keys must be plain strings or numbers, got tuples or sets")


def _opcodes(content: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int]]:
    """Yield (opcode, argument, place) to the end of the pickle; raise ValueError if it is cut off.

    Unlike `pickletools.genops`, it does not require ASCII strings in protocol 0.
    """
    stream = io.BytesIO(content)
    name = ""
    while name != "STOP":
        place = stream.tell()
        code = stream.read(1)
        if not code:
            raise ValueError(f"it ends at byte {place}, before the end of the pickle")
        opcode = _OPCODES.get(code.decode("latin-1"))
        if opcode is None:
            raise ValueError(f"byte {place} is not an opcode")
        name = opcode.name
        argument = None
        if name == "STRING":
            argument = stream.readline()
            if not argument.endswith(b"\n"):
                raise ValueError(f"byte {place} starts a string without an end")
        elif opcode.arg is not None:
            argument = opcode.arg.reader(stream)
        yield opcode, argument, place

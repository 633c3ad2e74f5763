"""Unpickles containers, strings and numbers, and nothing that could run code."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

# What builds dicts, lists, tuples, sets, strings and numbers, in any protocol, and no more.
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
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"asks for {module}.{name}")


def load_plain(path: Path) -> Any:
    """What a pickle of plain containers, strings and numbers holds, Python 2's too.

    Nothing in the file is run. Raises ValueError for a file that is damaged or asks for any class,
    function or outer object.
    """
    content = path.read_bytes()
    try:
        for opcode, argument, place in _opcodes(content):
            if opcode.name not in _PLAIN:
                asked = f", {argument}" if isinstance(argument, str) else ""
                raise ValueError(
                    f"byte {place} asks to run code or load a class ({opcode.name}{asked}), where "
                    "plain lists and strings alone are safe"
                )
            # An array of this size would be laid out.
            if "PUT" in opcode.name and not 0 <= int(argument or 0) <= len(content):
                raise ValueError(f"byte {place} numbers an object {argument}")
        return _Plain(io.BytesIO(content), encoding="utf-8").load()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} holds text that is not in UTF-8; convert it") from error
    # A damaged pickle may fail in any way whatever.
    except Exception as error:
        raise ValueError(f"{path} is damaged, or no plain pickle: {error}") from error


def _opcodes(content: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int]]:
    """(opcode, argument, place) up to the end of the pickle; raises ValueError if it is cut off.

    As `pickletools.genops`, which takes the strings of protocol 0 for ASCII, though.
    """
    stream = io.BytesIO(content)
    name = ""
    while name != "STOP":
        place = stream.tell()
        code = stream.read(1)
        if not code:
            raise ValueError(f"byte {place} is its end, but not that of a pickle")
        opcode = _OPCODES.get(code.decode("latin-1"))
        if opcode is None:
            raise ValueError(f"byte {place} is no opcode")
        name = opcode.name
        argument = None
        if name == "STRING":
            argument = stream.readline()
            if not argument.endswith(b"\n"):
                raise ValueError(f"byte {place} starts a string without an end")
        elif opcode.arg is not None:
            argument = opcode.arg.reader(stream)
        yield opcode, argument, place

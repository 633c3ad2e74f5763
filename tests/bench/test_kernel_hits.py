"""Kernels are counted by whether a run found them compiled, whichever processes asked for them."""

import pytest

from bench import kernel_calls, kernel_hits
from bench.rows import append_rows


def test_a_kernel_that_was_compiled_once_counts_as_compiled(tmp_path):
    path = tmp_path / "kernels.jsonl"
    assert kernel_hits.hit_rows(path) == []
    for name, found in (("a", True), ("b", False), ("b", True), ("a", True), ("c", True)):
        append_rows(path, [{"hash": name, "found": found}])
    assert kernel_hits.hit_rows(path) == [{"part": "kernels", "found": 2, "compiled": 1}]


@pytest.mark.interfaces
def test_triton_tells_what_it_compiles_and_what_it_finds(tmp_path):
    pytest.importorskip("triton")
    calls = {"host": kernel_calls.all_calls()["host"]}
    for number in range(2):
        path = tmp_path / f"{number}.jsonl"
        call = Listening(path, calls["host"])
        _, failed = kernel_calls.compile_all({"host": call}, tmp_path / "cache", lambda *_: None)
        assert failed == {}
        (row,) = kernel_hits.hit_rows(path)
        assert (row["found"], row["compiled"]) == ((0, 3), (3, 0))[number]


class Listening:
    """A call that is listened to, in the process that makes it."""

    def __init__(self, path, call):
        self.path, self.call = path, call

    def __call__(self):
        kernel_hits.listen(self.path)
        self.call()

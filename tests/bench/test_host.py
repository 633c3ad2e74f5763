"""The host's time becomes rows."""

from bench import host, tables
from bench.host import host_rows
from tokenmix_ops.timing import HostClock, environment


def test_the_host_becomes_rows(monkeypatch):
    monkeypatch.setattr(host, "CALLS", 2)
    monkeypatch.setattr(host, "REPEATS", 2)
    rows = host_rows(HostClock(), "cpu", backend="eager")
    assert {row["contender"] for row in rows} == {"eager", "sdpa"}
    assert all(len(row["rounds_us"]) == 2 for row in rows)
    assert "sdpa" in tables.host_table([{**row, **environment()} for row in rows])

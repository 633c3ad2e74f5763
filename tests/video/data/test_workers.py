"""Workers outlive signals while they are needed, and nobody waits for them afterwards."""

import os
import signal
import subprocess
import sys
from multiprocessing import active_children

import pytest
import torch
import waiting
from torch.utils.data import DataLoader, Dataset
from waiting import FOR_EVER

from tokenmix_ops.video.data import workers
from tokenmix_ops.video.data.workers import OutliveSignals


class Numbers(Dataset):
    """Numbers, and none above 99."""

    def __len__(self):
        return 200

    def __getitem__(self, index):
        if index > 99:
            raise ValueError("too large")
        return torch.tensor(index)


# A spawned worker imports everything again: one is enough.
STARTS = pytest.mark.parametrize(("context", "count"), [("fork", 2), ("spawn", 1)])


def loader(outliving, context, count):
    return DataLoader(
        Numbers(),
        batch_size=1,
        num_workers=count,
        worker_init_fn=outliving,
        multiprocessing_context=context,
    )


def alive(pids):
    return {process.pid: process for process in active_children() if process.pid in pids}


@pytest.mark.interfaces
@STARTS
def test_signals_do_not_end_workers_but_their_reader_does(monkeypatch, context, count):
    monkeypatch.setattr(workers, "_PATIENCE", FOR_EVER)
    outliving = OutliveSignals(count)
    stream = iter(loader(outliving, context, count))
    got = [int(next(stream)) for _ in range(6)]
    pids = list(outliving.pids)
    readers = alive(pids)
    assert readers.keys() == set(pids)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    with pytest.raises(ValueError, match="too large") as error:
        got.extend(int(number) for number in stream)
    assert got == list(range(100))
    assert alive(pids).keys() == set(pids)
    outliving.end()
    assert not alive(pids)
    # They left by themselves: neither ``end`` nor the loader had to wait and kill.
    assert [process.exitcode for process in readers.values()] == [0] * count
    del stream, error


def test_whoever_reads_to_the_end_has_nothing_to_end():
    outliving = OutliveSignals(1)
    rows = DataLoader(range(9), num_workers=1, worker_init_fn=outliving)
    assert len(list(rows)) == 9
    outliving.end()
    outliving.end()


@STARTS
def test_a_process_that_fails_while_it_reads_exits(tmp_path, context, count):
    script = tmp_path / "reads.py"
    script.write_text(
        f"import sys\nsys.path[:0] = {[os.path.dirname(f) for f in (__file__, waiting.__file__)]}\n"
        "from test_workers import OutliveSignals, loader\n"
        "if __name__ == '__main__':\n"
        f"    for number in loader(OutliveSignals({count}), {context!r}, {count}):\n"
        "        pass\n"
    )
    command = [sys.executable, script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=FOR_EVER)
    assert ended.returncode == 1
    assert "too large" in ended.stderr

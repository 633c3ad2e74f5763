"""Files as large as the official ones give the counts of the official splits."""

import pytest
from annotation_files import (
    LSMDC,
    VATEX,
    held,
    kinds,
    lsmdc_line,
    msrvtt_sentence,
    msrvtt_video,
    write,
)

from tokenmix_ops.video.data.prepare import prepare


@pytest.fixture
def videos(tmp_path):
    (tmp_path / "videos").mkdir()
    return tmp_path / "videos"


def spread(counts):
    """(number, split) of as many videos as a data set has, splits one after the other."""
    number = 0
    for split, count in counts.items():
        for _ in range(count):
            yield number, split
            number += 1


def full_msrvtt():
    names = {"train": "train", "val": "validate", "test": "test"}
    data = {"videos": [], "sentences": []}
    for number, split in spread({"train": 6513, "val": 497, "test": 2990}):
        data["videos"].append(msrvtt_video(f"video{number}", names[split]))
        for i in range(2):
            said = f"sentence {i} of {number}"
            data["sentences"].append(msrvtt_sentence(f"video{number}", said, 2 * number + i))
    tested = range(9000, 10000)
    return {
        "MSRVTT_data.json": data,
        "MSRVTT_train.9k.csv": "video_id\n" + "".join(f"video{i}\n" for i in range(9000)),
        "MSRVTT_train.7k.csv": "video_id\n" + "".join(f"video{i}\n" for i in range(7010)),
        "MSRVTT_JSFUSION_test.csv": "key,vid_key,video_id,sentence\n"
        + "".join(f"ret{i},msr{i},video{i},number {i}\n" for i in tested),
    }


def full_msvd():
    lists = {"train": "", "val": "", "test": ""}
    text = "# a corpus\n"
    for number, split in spread({"train": 1200, "val": 100, "test": 670}):
        lists[split] += f"vid_{number}_9\n"
        text += f"vid_{number}_9 one\nvid_{number}_9 two\n"
    return {f"{split}_list.txt": ids for split, ids in lists.items()} | {
        "AllVideoDescriptions.txt": text
    }


def full_vatex():
    entries = {"train": [], "val": [], "test": []}
    for number, split in spread({"train": 25991, "val": 3000, "test": 6000}):
        entries[split].append(
            {"videoID": f"{number:011d}_000010_000020", "enCap": ["one"], "chCap": []}
        )
    return dict(zip(VATEX, entries.values(), strict=True))


def full_lsmdc():
    lines = {"train": [], "val": [], "test": []}
    for number, split in spread({"train": 101079, "val": 7408, "test": 1000}):
        clip = f"{number // 700:04d}_A_Film_00.00.00.000-00.00.00.{number}"
        lines[split].append(lsmdc_line(clip, "SOMEONE waits."))
    names = [name for name in LSMDC if name != "LSMDC16_annos_test.csv"]
    return {name: "".join(own) for name, own in zip(names, lines.values(), strict=True)}


FULL = {
    "msrvtt": (
        full_msrvtt,
        {},
        {"train": (6513, 13026, 6513), "val": (497, 994, 497), "test": (2990, 5980, 2990)},
    ),
    "msrvtt 9k": (
        full_msrvtt,
        {"task": "retrieval"},
        {"train": (9000, 18000, 9000), "test": (1000, 1000, 1000)},
    ),
    "msrvtt 7k": (
        full_msrvtt,
        {"task": "retrieval", "training_list": "7k"},
        {"train": (7010, 14020, 7010), "test": (1000, 1000, 1000)},
    ),
    "msvd": (
        full_msvd,
        {},
        {"train": (1200, 2400, 1200), "val": (100, 200, 100), "test": (670, 1340, 670)},
    ),
    "vatex": (
        full_vatex,
        {},
        {"train": (25991, 25991, 25991), "val": (3000, 3000, 3000), "test": (6000, 6000, 6000)},
    ),
    "lsmdc": (
        full_lsmdc,
        {},
        {
            "train": (101079, 101079, 101079),
            "val": (7408, 7408, 7408),
            "test": (1000, 1000, 1000),
        },
    ),
}


@pytest.mark.parametrize("case", FULL)
def test_official_splits_have_their_counts(tmp_path, videos, case):
    files, options, wanted = FULL[case]
    folder = write(tmp_path / "annotations", files())
    prepared = prepare(case.split()[0], [folder], videos, tmp_path, **options)
    assert held(prepared) == wanted
    assert kinds(prepared) == []

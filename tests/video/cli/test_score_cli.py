"""``tokenmix score`` as a user types it."""

import json
import re

import pytest

from tokenmix_ops.video import cli
from tokenmix_ops.video.metrics.captions import FIGURES, OWN, caption_scores

PREDICTIONS = {"1": "a dog runs over the road", "2": "a cat sleeps on a mat today", "video3": "..."}
REFERENCES = {
    "1": ["a dog runs over a road", "The dog's run."],
    "2": ["a cat sleeps on a mat today"],
    "video3": ["birds fly"],
}
PYTHON = ("--tokenizer", "python", "--no-meteor")


@pytest.fixture
def files(tmp_path):
    """Paths of predictions and references; ids are numbers in one of them."""
    rows = [
        {"image_id": int(i) if len(i) == 1 else i, "caption": c} for i, c in PREDICTIONS.items()
    ]
    annotations = [{"image_id": i, "caption": c} for i, cs in REFERENCES.items() for c in cs]
    (tmp_path / "predictions.json").write_text(json.dumps(rows))
    (tmp_path / "references.json").write_text(json.dumps({"annotations": annotations}))
    return tmp_path / "predictions.json", tmp_path / "references.json"


def tokenmix(*arguments):
    cli.main(["score", *map(str, arguments)])


@pytest.mark.interfaces
def test_json_holds_each_figure_and_what_made_it(files, capsys):
    tokenmix(*files, *PYTHON, "--json")
    wanted = caption_scores(PREDICTIONS, REFERENCES, tokenizer="python", meteor=False).figures
    more = {"METEOR": None, "tokenizer": OWN, "ids": 3, "references": 4}
    assert json.loads(capsys.readouterr().out) == {**wanted, **more}


def test_the_table_names_the_tokenizer_and_why_there_is_no_meteor(files, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    tokenmix(*files)
    out, err = capsys.readouterr()
    names = [re.split(r"\s{2,}", line.strip())[0] for line in out.splitlines()]
    shown = [name for name in FIGURES if name != "METEOR"]
    assert names == [*shown, "tokenizer", "ids", "references"]
    assert re.search(rf"^tokenizer +{OWN}\s*$", out, re.MULTILINE)
    assert err.startswith("METEOR not available: no Java: there is no java on PATH")
    tokenmix(*files, "--no-meteor")
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit, match=r"^tokenmix: no Java: there is no java on PATH"):
        tokenmix(*files, "--tokenizer", "ptb")


def test_ids_that_were_not_predicted_can_be_left_out(files, capsys):
    predictions, references = files
    rows = json.loads(predictions.read_text())
    predictions.write_text(json.dumps(rows[:2]))
    with pytest.raises(SystemExit, match=r"predictions lack 1 \('video3'\) .* --only-predicted"):
        tokenmix(predictions, references, *PYTHON)
    tokenmix(predictions, references, *PYTHON, "--only-predicted", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["ids"], found["references"]) == (2, 3)
    rows.append({"image_id": "video4", "caption": "x"})
    predictions.write_text(json.dumps(rows))
    with pytest.raises(
        SystemExit, match=r"references lack 1 .'video4'. of the 4 ids in predictions"
    ):
        tokenmix(predictions, references, *PYTHON, "--only-predicted")


def test_ids_without_captions_are_counted(files, tmp_path, capsys):
    predictions, references = files
    tokenmix(*files, *PYTHON, "--json")
    out, err = capsys.readouterr()
    assert err == ""
    document = json.loads(references.read_text())
    document["images"] = [{"id": name} for name in (*REFERENCES, 8, "video9")]
    references.write_text(json.dumps(document))
    tokenmix(*files, *PYTHON, "--json")
    said = f"without captions, and left out: 2 of the 5 ids in {references}\n"
    assert capsys.readouterr() == (out, said)
    listed = tmp_path / "videos.jsonl"
    captions = {**REFERENCES, "silent": []}
    lines = [
        {"video": f"{name}.mp4", "video_id": name, "captions": own, "split": "test"}
        for name, own in captions.items()
    ]
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenmix(predictions, listed, *PYTHON, "--json")
    said = f"without captions, and left out: 1 of the 4 ids in {listed}\n"
    assert capsys.readouterr() == (out, said)
    rows = [*json.loads(predictions.read_text()), {"image_id": "8", "caption": "x"}]
    predictions.write_text(json.dumps(rows))
    with pytest.raises(SystemExit, match=r"references lack 1 \('8'\) of the 4 ids in predictions"):
        tokenmix(*files, *PYTHON)


def test_references_may_be_a_list_of_videos(files, tmp_path, capsys):
    videos = [
        {"video": f"{name}.mp4", "video_id": name, "captions": captions, "split": split}
        for name, captions, split in (
            *((name, captions, "val") for name, captions in REFERENCES.items()),
            ("other", ["not of this split"], "test"),
        )
    ]
    listed = tmp_path / "videos.jsonl"
    listed.write_text("".join(json.dumps(video) + "\n" for video in videos))
    tokenmix(*files, *PYTHON, "--json")
    tokenmix(files[0], listed, "--split", "val", *PYTHON, "--json")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == second
    with pytest.raises(SystemExit, match=r"references lack 3 .* of the 3 ids in predictions"):
        tokenmix(files[0], listed, *PYTHON)


def test_what_cannot_be_scored_is_a_sentence(files, tmp_path):
    with pytest.raises(SystemExit, match=r"^tokenmix: .*none\.json"):
        tokenmix(files[0], tmp_path / "none.json")
    with pytest.raises(
        SystemExit, match=r"^tokenmix: .*predictions\.json must hold a list of annotations"
    ):
        tokenmix(files[0], files[0])
    with pytest.raises(
        SystemExit, match=r"^tokenmix: expected time_limit above 0 seconds, got 0\.0"
    ):
        tokenmix(*files, "--time-limit", "0")

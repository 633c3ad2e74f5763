"""Captions and references as COCO's files have them, and as they should not be."""

import json

import pytest

from tokenmix_ops.video.metrics.caption_files import (
    paired,
    read_predictions,
    read_references,
    write_predictions,
)


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "file.json"
        content = content if isinstance(content, (str, bytes)) else json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def entry(image_id, caption="a dog"):
    return {"image_id": image_id, "caption": caption, "id": 7}


def test_whole_numbers_and_strings_are_one_id(file):
    path = file([entry(1, "one"), entry("2", "two"), entry("video7"), entry(-(10**30), "")])
    predictions = read_predictions(path)
    assert predictions == {"1": "one", "2": "two", "video7": "a dog", "-1" + "0" * 30: ""}
    path = file({"annotations": [entry(1, "x"), entry("2"), entry("1", "y")], "info": {}})
    assert read_references(path) == {"1": ["x", "y"], "2": ["a dog"]}


def test_references_are_in_the_order_of_the_images_as_in_the_coco_evaluation(file):
    annotations = [entry(1), entry(2), entry(3), entry(2, "z")]
    images = [{"id": 3}, {"id": "2"}, {"id": 9}]
    references = read_references(file({"images": images, "annotations": annotations}))
    assert list(references.items()) == [
        *(("3", ["a dog"]), ("2", ["a dog", "z"]), ("9", []), ("1", ["a dog"]))
    ]
    predictions, kept = paired({"1": "x", "3": "y"}, references, only_predicted=True)
    assert list(predictions.items()) == [("3", "y"), ("1", "x")]
    assert kept == {"3": ["a dog"], "1": ["a dog"]}


def test_what_is_written_is_read(tmp_path):
    predictions = {"1": "caf\u00e9 😀\n\u2028", "b": ""}
    write_predictions(tmp_path / "out.json", predictions)
    assert read_predictions(tmp_path / "out.json") == predictions


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
def test_byte_order_marks_and_windows_line_ends(file, prefix):
    text = json.dumps([entry(1, "café")], ensure_ascii=False, indent=1).replace("\n", "\r\n")
    assert read_predictions(file(prefix + text.encode())) == {"1": "café"}


GOOD = json.dumps([entry(1), entry(2)])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (GOOD[:-1], r"is not JSON: .* at line 1, column \d+, is it cut off\?$"),
        (GOOD[:30], r"is not JSON: .* at line 1, column \d+"),
        ("", r"is not JSON: Expecting value at line 1, column 1, is it cut off\?"),
        (GOOD.replace(",", ";"), r"is not JSON: .* at line 1, column 16$"),
        ("[" * 200_000, "is not readable JSON"),
        (f'[{{"image_id": {"9" * 5000}, "caption": "x"}}]', "is not readable JSON"),
        ("café".encode("latin-1"), r"is not UTF-8 \(byte 3 is 0xe9\): save it"),
        (GOOD.encode("utf-16"), r"is not UTF-8 \(byte 0 is 0xff\)"),
        ({"annotations": []}, r"must hold a list of predictions, \[\{.*, got an object$"),
        ("null", "must hold a list of predictions, .*, got null$"),
        ([entry(1), 5], r": entry 2 must be an object, got 5"),
        ([entry(1), [1, "x"]], r": entry 2 must be an object, got a list"),
        ([entry(1.0)], r": entry 1: image_id must be an integer or a string, got 1\.0"),
        ([entry(True)], ": entry 1: image_id must be .*, got true"),
        ([entry(None)], ": entry 1: image_id must be .*, got null"),
        ([entry("")], ': entry 1: image_id must be .*, got ""'),
        ([entry({})], ": entry 1: image_id must be .*, got an object"),
        ([{"caption": "x"}], ": entry 1: image_id must be .*, got nothing"),
        (
            [entry(1), {"image_id": 2}],
            r"entry 2 \(image_id 2\): caption must be a string, got nothing",
        ),
        ([entry(1, None)], r"entry 1 \(image_id 1\): caption must be a string, got null"),
        ([entry(1, ["x"])], r"entry 1 \(image_id 1\): caption must be a string, got a list"),
        (
            [entry(1), entry(2), entry("1")],
            ": entry 3: expected one caption per image_id, got two for '1'",
        ),
    ],
)
def test_predictions_that_cannot_be_are_named_with_file_and_entry(file, content, sentence):
    path = file(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([entry(1)], "must hold a list of annotations, .*, got a list without one$"),
        (
            {"annotations": {"1": "x"}},
            "must hold a list of annotations, .*, got an object without one$",
        ),
        (
            {"annotations": [entry(1), entry(2, 3)]},
            r"entry 2 \(image_id 2\): caption must be a string, got 3",
        ),
        ({"annotations": [], "images": {}}, "images must be a list, got an object"),
        (
            {"annotations": [], "images": [{"id": 1}, {}]},
            "entry 2 of images: id must be .*, got nothing",
        ),
    ],
)
def test_references_that_cannot_be_are_named_with_file_and_entry(file, content, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_references(file(content))


def test_an_id_without_captions_has_no_references():
    references = {"1": ["x"], "2": []}
    assert paired({"1": "y"}, references) == ({"1": "y"}, {"1": ["x"]})
    for only_predicted in (False, True):
        with pytest.raises(
            ValueError,
            match=r"references lack 1 \('2'\) of the 2 ids in predictions; .* such as '1'$",
        ):
            paired({"1": "y", "2": "z"}, references, only_predicted=only_predicted)


def test_an_id_that_one_side_lacks_is_named():
    with pytest.raises(
        ValueError, match=r"references lack 1 \('7'\) of the 2 ids in predictions; .* such as '1'$"
    ):
        paired({"1": "x", "7": "y"}, {"1": ["x"], "8": ["y"]})
    references = {str(number): ["x"] for number in range(9)}
    with pytest.raises(ValueError, match=r"predictions lack 7 \('2', .* '6', \.\.\.\) of the 9"):
        paired({"0": "x", "1": "y"}, references)
    with pytest.raises(ValueError, match="pass --only-predicted to score only the predicted"):
        paired({"0": "x"}, references)
    assert paired({"4": "x"}, references, only_predicted=True) == ({"4": "x"}, {"4": ["x"]})
    with pytest.raises(ValueError, match="references lack 1 "):
        paired({"0": "x", "10": "y"}, references, only_predicted=True)

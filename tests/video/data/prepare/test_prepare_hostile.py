"""Files that are wrong are refused by name and place; none runs code, none leads elsewhere."""

import json
import os
import pickle
import pickletools
import re

import pytest
from counting import steps
from hypothesis import given
from hypothesis import strategies as st

from tokenmix_ops.video.data.manifest import summary
from tokenmix_ops.video.data.prepare import prepare
from tokenmix_ops.video.data.prepare.plain_pickle import load_plain
from tokenmix_ops.video.data.prepare.reading import (
    read_csv,
    read_text,
    video_name,
    video_path,
)

VIDEO = {"video_id": "video0", "split": "train"}
SENTENCE = {"sen_id": 0, "video_id": "video0", "caption": "caf\u00e9"}
MSRVTT = {"videos": [VIDEO], "sentences": [SENTENCE]}
LSMDC_LINE = "a_clip\t1\t2\t1\t2\tun caf\u00e9\n"


def read(tmp_path, dataset, name, content, **options):
    """Prepares a data set from files by name, or one file and its content."""
    for file, inside in (content if isinstance(content, dict) else {name: content}).items():
        data = inside if isinstance(inside, bytes) else inside.encode()
        (tmp_path / file).write_bytes(data)
    (tmp_path / "videos").mkdir(exist_ok=True)
    if dataset == "lists":
        options["splits"] = {"train": tmp_path / name}
    annotations = [] if dataset == "lists" else [tmp_path]
    return prepare(dataset, annotations, tmp_path / "videos", tmp_path, **options)


def refused(tmp_path, reason, *arguments, **options):
    with pytest.raises(ValueError, match=reason) as caught:
        read(tmp_path, *arguments, **options)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 700


# A good file of each kind.
FILES = {
    "JSON": ("msrvtt", "MSRVTT_data.json", json.dumps(MSRVTT, ensure_ascii=False)),
    "list": ("lists", "a.json", '[{"video": "a", "caption": "caf\u00e9"}]'),
    "VATEX": ("vatex", "vatex_training_v1.0.json", '[{"videoID": "a", "enCap": ["caf\u00e9"]}]'),
    "tabs": ("lsmdc", "LSMDC16_annos_training.csv", LSMDC_LINE),
}


@pytest.mark.parametrize("kind", FILES)
def test_wrong_encodings_are_named(tmp_path, kind):
    dataset, name, text = FILES[kind]
    assert read(tmp_path, dataset, name, text).videos[0].captions[0].endswith("caf\u00e9")
    spaced = "\n\n" + text if dataset != "lsmdc" else LSMDC_LINE.replace("\u00e9", "e") * 2 + text
    reason = rf"{re.escape(name)}, line 3: is not UTF-8 \(byte 0xe9\); convert"
    refused(tmp_path, reason, dataset, name, spaced.encode("latin-1"))
    for encoding in ("utf-16", "utf-16-be", "utf-16-le"):
        mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
        content = mark + text.encode(encoding)
        refused(tmp_path, "UTF-16|UTF-8|not JSON|NUL", dataset, name, content)
    windows = b"\xef\xbb\xbf" + text.replace(", ", ",\r\n").encode()
    assert len(read(tmp_path, dataset, name, windows).videos) == 1


@pytest.mark.parametrize("content", [b"", b" \n\r\n", b"\xef\xbb\xbf"], ids=repr)
@pytest.mark.parametrize("kind", FILES)
def test_empty_files_are_named(tmp_path, kind, content):
    dataset, name, _ = FILES[kind]
    refused(tmp_path, rf"{re.escape(name)} is empty$", dataset, name, content)


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "tabs"])
def test_json_cut_off_is_named(tmp_path, kind):
    dataset, name, text = FILES[kind]
    for length in range(1, len(text)):
        reason = rf"{re.escape(name)}, line 1: is not JSON: "
        refused(tmp_path, reason, dataset, name, text[:length])
    for deep in ("[" * 100_000, '{"videos":' * 100_000, "[" * 900 + "]" * 900):
        refused(tmp_path, "is nested too deeply|is not JSON|must |lacks", dataset, name, deep)
    refused(tmp_path, "must|is not JSON", dataset, name, "9" * 10_000)


def broken(path, value):
    """The good MSR-VTT file with a field replaced, or deleted if the value is ``...``."""
    data = json.loads(json.dumps(MSRVTT))
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


FIELDS = {
    "no videos": (broken(["videos"], ...), r"json: lacks 'videos' \(fields: 'sentences'\)"),
    "no sentences": (broken(["sentences"], ...), r"json: lacks 'sentences' \(fields: 'videos'\)"),
    "videos": (broken(["videos"], {}), r"json: 'videos' must be a list, got \{\}"),
    "a video": (broken(["videos", 0], 7), r"videos\[0\]: must be an object, got 7"),
    "no id": (broken(["videos", 0, "video_id"], ...), r"videos\[0\]: lacks 'video_id'"),
    "id": (broken(["videos", 0, "video_id"], 7), r"videos\[0\]: 'video_id' must be a string, got"),
    "no split": (broken(["videos", 0, "split"], ...), r"videos\[0\]: lacks 'split'"),
    "split": (broken(["videos", 0, "split"], ["train"]), r"'split' must be a string, got \['tr"),
    "a sentence": (broken(["sentences", 0], []), r"sentences\[0\]: must be an object"),
    "caption": (broken(["sentences", 0, "caption"], None), r"\[0\]: 'caption' must be a string"),
    "surrogate": (broken(["sentences", 0, "caption"], "\ud800"), r"'caption' must be a string"),
    "NUL": (broken(["sentences", 0, "caption"], "a\0"), r"'caption' must be a string"),
    "no caption": (broken(["sentences", 0, "caption"], ...), r"sentences\[0\]: lacks 'caption'"),
    "whose": (broken(["sentences", 0, "video_id"], ...), r"sentences\[0\]: lacks 'video_id'"),
    "a time": (
        broken(["videos", 0], {**VIDEO, "url": "v=a", "start time": "1", "end time": 2}),
        r"videos\[0\]: 'start time' must be at least 0 seconds, got '1'",
    ),
    "a list": ([MSRVTT], r"json: must be an object, got \["),
    "long": (broken(["videos"], "x" * 10**6), r"'videos' must be a list, got 'xx"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields_of_msrvtt(tmp_path, case):
    content, reason = FIELDS[case]
    refused(tmp_path, reason, "msrvtt", "MSRVTT_data.json", json.dumps(content))


ENTRIES = {
    "object": ("vatex", {}, r"json: must hold a list, got \{\}"),
    "entry": ("vatex", ["a"], r"\[0\]: must be an object, got 'a'"),
    "id": ("vatex", [{"videoID": None, "enCap": ["a"]}], r"\[0\]: 'videoID' must be a string"),
    "private test": ("vatex", [{"videoID": "a"}], r"\[0\]: 'a' lacks 'enCap'; the private test"),
    "captions": ("vatex", [{"videoID": "a", "enCap": "a"}], r"'enCap' must be a list of strings"),
    "caption": ("vatex", [{"videoID": "a", "enCap": [1]}], r"must be a list of strings, got \[1"),
    "scalar": ("lists", 3, r"json: must hold a list or an object, got 3"),
    "no video": ("lists", [{"caption": "a"}], r"\[0\]: lacks 'video' \(fields: 'caption'\)"),
    "no caption": ("lists", [{"video": "a"}], r"\[0\]: lacks 'caption' \(fields: 'video'\)"),
    "video": ("lists", [{"video": 3, "caption": "a"}], r"\[0\]: 'video' must be a string, got 3"),
    "said": ("lists", [{"video": "a", "caption": 3}], r"\[0\]: 'caption' must be a string, got 3"),
    "sayings": ("lists", [{"video": "a", "caption": [3]}], r"must be a list of strings, got \[3"),
    "COCO": ("lists", {}, r"json: lacks 'annotations' \(fields: none\)"),
    "COCO's": ("lists", {"annotations": 1}, r"json: 'annotations' must be a list, got 1"),
    "flag": ("lists", {"annotations": [{"image_id": True, "caption": "a"}]}, r"'image_id' must be"),
    "number": ("lists", [{"image_id": 3, "caption": "a"}], r"\[0\]: lacks 'video' \(fields:"),
    "minus": ("lists", {"annotations": [{"image_id": -1, "caption": "a"}]}, r"'image_id' must be"),
    "file": (
        "lists",
        {"images": [{"id": 1, "file_name": "/a/b.mp4"}], "annotations": []},
        r"images\[0\]: expected a path in the videos' folder, .* got '/a/b\.mp4'",
    ),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_fields_of_lists(tmp_path, case):
    dataset, content, reason = ENTRIES[case]
    name = "vatex_training_v1.0.json" if dataset == "vatex" else "a.json"
    refused(tmp_path, reason, dataset, name, json.dumps(content))


OUTSIDE = ["../a", "a/../b", "/etc/passwd", "a\\b", "..", ".", "", " ", "a\nb", "..\\a.mp4", "a/.."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_are_refused(tmp_path, name):
    reason = "is not a valid video name|expected a video name without folders"
    vatex = json.dumps([{"videoID": name, "enCap": ["a"]}])
    refused(tmp_path, reason, "vatex", "vatex_training_v1.0.json", vatex)
    listed = json.dumps([{"video": name, "caption": "a"}])
    below = "is not a valid video name|expected a path in the videos' folder"
    refused(tmp_path, below, "lists", "a.json", listed)
    data = json.dumps(broken(["videos", 0, "video_id"], name))
    refused(tmp_path, reason, "msrvtt", "MSRVTT_data.json", data)
    if name.strip() and "\n" not in name:
        line = LSMDC_LINE.replace("a_clip", name)
        refused(tmp_path, reason, "lsmdc", "LSMDC16_annos_training.csv", line)


@given(st.text(st.characters(codec="utf-8")))
def test_a_name_stays_in_its_folder(text):
    try:
        name = video_name(text, "here")
    except ValueError as error:
        assert str(error).startswith("here: ")  # noqa: PT017
    else:
        path = os.path.normpath(os.path.join("/videos", name))
        assert os.path.dirname(path) == "/videos"


@given(st.text(st.characters(codec="utf-8")) | st.text("a./\\", max_size=12))
def test_a_path_stays_below_the_folder(text):
    try:
        path = video_path(text, "here")
    except ValueError as error:
        assert str(error).startswith("here: ")  # noqa: PT017
    else:
        assert os.path.normpath(f"/videos/{path}") == f"/videos/{path}"


def test_names_with_folders_are_for_lists_alone(tmp_path):
    for kind in ("VATEX", "JSON", "tabs"):
        dataset, name, text = FILES[kind]
        text = text.replace("video0", "a/b").replace('ID": "a"', 'ID": "a/b"')
        reason = "expected a video name without folders, got 'a/b'"
        refused(tmp_path, reason, dataset, name, text.replace("a_clip", "a/b"))
    long = json.dumps([{"video": "a/" * 10**6 + "b", "caption": "a"}])
    refused(tmp_path, r"\[0\]: .* is too long for a path", "lists", "a.json", long)


def test_names_that_are_too_long_are_refused(tmp_path):
    for name, fits in {"\u00e9" * 125: True, "\u00e9" * 126: False, "a" * 10**6: False}.items():
        content = json.dumps([{"video": name, "caption": "a"}])
        if fits:
            assert read(tmp_path, "lists", "a.json", content).videos[0].video_id == name
        else:
            refused(tmp_path, r"\[0\]: .* is too long for a file name", "lists", "a.json", content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["a", "", "train"]),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("video", "image", "caption", "image_id", "id", "images", "annotations"),
                    *("videos", "sentences", "video_id", "split", "url", "file_name"),
                    *("videoID", "enCap", "start time", "end time"),
                ]
            ),
            inner,
        )
    ),
)


@given(JSON, st.sampled_from(["JSON", "list", "VATEX"]))
def test_json_at_random_is_read_or_refused(tmp_path_factory, content, kind):
    dataset, name, _ = FILES[kind]
    folder = tmp_path_factory.mktemp("j")
    try:
        found = read(folder, dataset, name, json.dumps(content))
    except ValueError as error:
        assert name in str(error) or str(error).startswith("expected at least one usable video")  # noqa: PT017
    else:
        assert found.videos


# A pickle asks for a function by its module and name, or calls what it has asked for.
class Runs:
    def __init__(self, what):
        self.what = what

    def __reduce__(self):
        return os.system, (self.what,)


CODE = {
    "system": lambda touch: pickle.dumps({"a": Runs(touch)}),
    "system, protocol 0": lambda touch: pickle.dumps({"a": Runs(touch)}, 0),
    "global": lambda touch: b"cos\nsystem\n(S'" + touch.encode() + b"'\ntR.",
    "instance": lambda touch: b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
    "object": lambda touch: b"(cos\nsystem\nS'" + touch.encode() + b"'\no.",
    "after the end": lambda touch: pickle.dumps({"a": [["b"]]})[:-1] + b"0cos\nsystem\n.",
}


@pytest.mark.parametrize("case", CODE)
def test_a_pickle_runs_nothing(tmp_path, case):
    proof = tmp_path / "ran"
    (tmp_path / "train_list.txt").write_text("a")
    content = CODE[case](f"touch {proof}")
    reason = r"raw-captions\.pkl is damaged or not a plain pickle: byte [0-9]+ would run code or "
    refused(tmp_path, reason, "msvd", "raw-captions.pkl", content)
    assert not proof.exists()
    if case != "after the end":
        pickle.loads(content)
        assert proof.exists()


class Text(str):
    pass


CONTENTS = {
    "a class": (pickle.dumps({Text("a"): []}), r"not a plain pickle: byte [0-9]+ would run code"),
    "bytes": (pickle.dumps({"a": [[b"x"]]}), r"not a plain pickle: byte [0-9]+ would run code"),
    "outer": (b"Pouter\n.", r"not a plain pickle: byte 0 would run code or load a class \(PERSID"),
    "extension": (b"\x80\x02\x82\x01.", r"\(EXT1\); expected only plain"),
    "a huge array": (b"\x80\x02]r\xff\xff\xff\x7f.", r"byte 3 has the memo index 2147483647"),
    "a list": (pickle.dumps([["a"]]), r"must hold a dict from id to captions, got \[\['a'\]\]"),
    "ids": (pickle.dumps({7: []}), r"ids must be strings, got 7"),
    "captions": (pickle.dumps({"a": "b c"}), r"'a': must be a list, got 'b c'"),
    "strings": (pickle.dumps({"a": ["b c"]}), r"'a'\[0\]: must be a list of strings, got 'b c'"),
    "tokens": (pickle.dumps({"a": [["b", 1]]}), r"'a'\[0\]: must be a list of strings, got \['b'"),
    "deep": (b"\x80\x02}U\x01a" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"s.", r"must be a list of"),
    "itself": (b"\x80\x02}U\x01a]q\x00h\x00as.", r"must be a list of strings, got \[\[\["),
    "latin-1, protocol 0": (
        b"(dS'a'\n((lS'\\xe9'\natas.",
        r"text that is not UTF-8; convert it",
    ),
    "no end of a string": (b"(dS'a", r"not a plain pickle: byte 2 starts a string without an end"),
    "no opcode": (b"(d\xff.", r"not a plain pickle: byte 2 is not an opcode"),
    "cut off": (b"(d", r"not a plain pickle: it ends at byte 2, before the end"),
    "latin-1": (b"\x80\x02}U\x01a](U\x02\xe9bes.", r"holds text that is not UTF-8"),
    "text": (b"a man cooks", r"is damaged or not a plain pickle"),
    "empty": (b"", r"is damaged or not a plain pickle"),
    "outside": (
        pickle.dumps({"../a": [["b"]]}),
        r"expected a video name without folders, got '\.\./a'",
    ),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_what_a_pickle_may_hold(tmp_path, case):
    content, reason = CONTENTS[case]
    (tmp_path / "train_list.txt").write_text("a")
    refused(tmp_path, reason, "msvd", "raw-captions.pkl", content)


def test_a_pickle_that_repeats_itself_without_end_is_refused(tmp_path):
    (tmp_path / "train_list.txt").write_text("a")
    several = [[["word"] * 300] * 300] * 300
    content = pickle.dumps({f"a{i}": captions for i, captions in enumerate(several)})
    assert len(content) < 10_000
    reason = r"'a[01]'\[[0-9]+\]: expected at most 50 times the file's size in text, got more"
    refused(tmp_path, reason, "msvd", "raw-captions.pkl", content)
    wordless = pickle.dumps({f"a{i}": captions for i, captions in enumerate([[[]] * 999] * 999)})
    refused(tmp_path, "50 times the file's size", "msvd", "raw-captions.pkl", wordless)
    own = pickle.dumps({"a": [["some", "words"]] * 100})
    assert len(read(tmp_path, "msvd", "raw-captions.pkl", own).videos[0].captions) == 100


def test_keys_that_would_take_for_ever_to_hash_are_refused(tmp_path):
    path = tmp_path / "x.pkl"
    deep = b")" + b"\x85" * 100_000
    shared = b")" + b"2\x86" * 100
    for key in (deep, shared):
        for content in (
            b"\x80\x02}" + key + b"K\x01s.",
            b"\x80\x02}(" + key + b"K\x01u.",
            b"\x80\x02(" + key + b"K\x01d.",
            b"\x80\x04\x8f(" + key + b"\x90.",
            b"\x80\x04(" + key + b"\x91.",
            b"\x80\x02" + key + b"q\x00" + b"0}h\x00K\x01s.",
        ):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="keys must be plain strings or numbers"):
                load_plain(path)
    path.write_bytes(pickle.dumps({"a": (("b", "c"), [("d",)])}))
    assert load_plain(path) == {"a": (("b", "c"), [("d",)])}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner)
        | st.frozensets(st.text())
        | st.sets(st.text())
    ),
)


@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL), st.booleans())
def test_plain_pickles_are_loaded(tmp_path_factory, value, protocol, optimized):
    content = pickle.dumps(value, protocol)
    # Sets have no code of their own in the old protocols.
    asks = any(code.name in ("GLOBAL", "REDUCE") for code, _, _ in pickletools.genops(content))
    path = tmp_path_factory.mktemp("p") / "x.pkl"
    path.write_bytes(pickletools.optimize(content) if optimized else content)
    if asks:
        with pytest.raises(ValueError, match="would run code or load a class"):
            load_plain(path)
    else:
        assert load_plain(path) == value


def test_a_damaged_pickle_is_refused_or_plain(tmp_path):
    good = pickle.dumps({"a": [["b", "c"]], "d": [["e"]]}, 2)
    path = tmp_path / "x.pkl"
    refusals = 0
    for place in range(len(good)):
        for byte in {0, 255, good[place] ^ 1, good[place] ^ 128, *b"cR.(0"}:
            path.write_bytes(good[:place] + bytes([byte]) + good[place + 1 :])
            try:
                load_plain(path)
            except ValueError as error:
                assert str(error).startswith(f"{path} ")  # noqa: PT017
                refusals += 1
        path.write_bytes(good[:place])
        with pytest.raises(ValueError, match=r"is damaged or not a plain pickle"):
            load_plain(path)
    assert refusals > len(good)


def test_lists_of_comma_separated_values(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes('\ufeffkey,video_id\r\n"a, ""b""\r\nc",d\u2028e\r\n'.encode())
    rows = list(read_csv(path, ["video_id", "key"]))
    assert [(where, row["video_id"]) for where, row in rows] == [(f"{path}, line 3", "d\u2028e")]
    assert rows[0][1]["key"].replace("\r\n", "\n") == 'a, "b"\nc'
    for content, reason in {
        "video\na\n": r"line 1: lacks the column video_id, sentence \(columns: 'video'\)",
        "video_id,sentence\na\n": r"line 2: lacks sentence",
        "video_id,sentence\na,b\nc,d, e,f\n": (
            r"line 3: expected 2 columns as in the header, got 4: quote text that contains a comma$"
        ),
        "video_id,sentence\na,b,\n": r"line 2: expected 2 columns as in the header, got 3: quote",
        'video_id,sentence\na,"b': r"line 2: is not CSV",
        "video_id,sentence\na,b\0c\n": r"line 2: (expected text, got a NUL|is not CSV)",
        f"video_id,sentence\na,{'b' * 200_000}\n": r"line 2: is not CSV: field larger than",
    }.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=reason) as caught:
            list(read_csv(path, ["video_id", "sentence"]))
        assert str(caught.value).startswith(f"{path}, line ")


def test_a_sentence_with_a_bare_comma_is_not_cut(tmp_path):
    name = "MSRVTT_JSFUSION_test.csv"
    text = "key,vid_key,video_id,sentence\nret1,msr3,video3,{}\n"
    good = read(tmp_path, "msrvtt", name, text.format('"a man, a woman"'), task="retrieval")
    assert good.videos[0].captions == ("a man, a woman",)
    reason = r"test\.csv, line 2: expected 4 columns as in the header, got 5: quote text that"
    refused(tmp_path, reason, "msrvtt", name, text.format("a man, a woman"), task="retrieval")


def test_columns_of_lsmdc(tmp_path):
    name = "LSMDC16_annos_training.csv"
    comma = LSMDC_LINE.replace("\t", ",")
    refused(tmp_path, r"line 1: expected 6 tab-separated columns", "lsmdc", name, comma)
    refused(
        tmp_path, r"line 1: expected text, got a NUL", "lsmdc", name, LSMDC_LINE.replace("un", "\0")
    )


def test_files_that_are_not_as_asked(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    (tmp_path / "vatex_training_v1.0.json").mkdir()
    with pytest.raises(ValueError, match=r"expected one of vatex_training_v1\.0\.json, .*, got "):
        prepare("vatex", [tmp_path], videos)
    with pytest.raises(OSError, match=r"gone\.json does not exist"):
        prepare("vatex", [tmp_path / "gone.json"], videos)
    with pytest.raises(IsADirectoryError):
        prepare("lists", [], videos, splits={"train": tmp_path})
    mine = tmp_path / "mine.json"
    mine.write_text('[{"videoID": "a", "enCap": ["b"]}]')
    with pytest.raises(ValueError, match=r"expected a file named vatex_tr.*, got .*mine\.json"):
        prepare("vatex", [mine], videos)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "vatex_validation_v1.0.json").write_text(mine.read_text())
    with pytest.raises(ValueError, match=r"exists twice, as .*one.* and .*two.*: pass one of them"):
        prepare("vatex", [tmp_path], videos)
    found = prepare("vatex", [tmp_path / "two"], videos)
    assert [video.split for video in found.videos] == ["val"]
    for wrong in (mine, tmp_path / "gone"):
        with pytest.raises(OSError, match="is not a folder: pass the folder of videos"):
            prepare("vatex", [tmp_path / "two"], wrong)


def test_lists_that_lack_their_other_half(tmp_path):
    (tmp_path / "videos").mkdir()

    def asks(reason, dataset, files, **options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
        with pytest.raises(ValueError, match=reason):
            prepare(dataset, [folder], tmp_path / "videos", **options)

    data, retrieval = json.dumps(MSRVTT), {"task": "retrieval"}
    asks(r"lack MSRVTT_JSFUSION_test\.csv", "msrvtt", {"MSRVTT_data.json": data}, **retrieval)
    tested = {"MSRVTT_JSFUSION_test.csv": "video_id,sentence\nvideo9,a\n"}
    both = {**tested, "MSRVTT_data.json": data}
    asks(r"annotations lack MSRVTT_train\.9k\.csv, got only", "msrvtt", both, **retrieval)
    seven = {**tested, "MSRVTT_train.7k.csv": "video_id\nvideo0\n"}
    asks(r"nnotations lack MSRVTT_data\.json or", "msrvtt", seven, training_list="7k", **retrieval)
    asks(r"lack MSRVTT_data\.json or", "msrvtt", tested)
    asks(r"lack train_list\.txt or", "msvd", {"AllVideoDescriptions.txt": "a b"})
    asks(r" lack AllVideoDescriptions\.txt or raw", "msvd", {"train_list.txt": "a"})


@pytest.mark.parametrize("count", [3_000, pytest.param(10**6, marks=pytest.mark.slow)])
def test_every_line_of_a_long_file_is_a_caption(tmp_path, count):
    (tmp_path / "train_list.txt").write_text("".join(f"vid{i}_1_9\n" for i in range(1000)))
    text = "".join(f"vid{i % 1000}_1_9 a man cooks\n" for i in range(count))
    found = read(tmp_path, "msvd", "AllVideoDescriptions.txt", text)
    assert [(one.videos, one.captions) for one in found.counts[:1]] == [(1000, count)]


def captions(count):
    ids = [f"vid{i % 50}_1_9" for i in range(count)]
    name, said = "AllVideoDescriptions.txt", "".join(f"{one} a man cooks\n" for one in ids)
    return "msvd", name, {"train_list.txt": "\n".join(dict.fromkeys(ids)), name: said}


def problems(count):
    lines = (LSMDC_LINE.replace("a_clip", f"clip{i // 2}") for i in range(count))
    return "lsmdc", "LSMDC16_annos_training.csv", "".join(lines)


@pytest.mark.parametrize("lines", [captions, problems])
def test_work_grows_with_the_number_of_lines_alone(tmp_path, lines):
    taken = []
    for count in (100, 800):
        folder, file = tmp_path / str(count), lines(count)
        folder.mkdir()
        found = []
        taken.append(steps(lambda: found.append(read(folder, *file))))  # noqa: B023
        half = count // 2
        if lines is problems:
            assert summary(found[0].problems) == f"{half} duplicates, {half} missing videos"
    assert taken[1] < 8 * 1.2 * taken[0]


def test_the_line_of_a_wrong_byte(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\n\xff")
    with pytest.raises(ValueError, match=r"x\.txt, line 3: is not UTF-8 \(byte 0xff\)"):
        read_text(path)

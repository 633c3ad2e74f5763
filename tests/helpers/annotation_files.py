"""Each data set's files in small, with the videos that they hold, and how tests write them."""

import json


def write(folder, files, mark=""):
    """Files by name: text as it is, after the mark, pickles as bytes, all else as JSON."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_bytes((mark + text).encode())
    return folder


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def held(prepared):
    """Videos and captions of each split, and the official number of videos."""
    return {one.split: (one.videos, one.captions, one.official) for one in prepared.counts}


def kinds(prepared, but="missing video"):
    return [problem.kind for problem in prepared.problems if problem.kind != but]


def msrvtt_video(name, split):
    number = int(name.removeprefix("video"))
    times = {"start time": 137.72, "end time": 149.44, "category": 9}
    return {"video_id": name, "id": number, "split": split, "url": "https://x", **times}


def msrvtt_sentence(name, caption, number=0):
    return {"sen_id": number, "video_id": name, "caption": caption}


MSRVTT = {
    "videos": [
        msrvtt_video("video0", "train"),
        msrvtt_video("video1", "validate"),
        msrvtt_video("video2", "test"),
        msrvtt_video("video3", "train"),
    ],
    "sentences": [
        msrvtt_sentence("video2", "a man sings"),
        msrvtt_sentence("video0", "a car is shown"),
        msrvtt_sentence("video1", "a cat, they say"),
        msrvtt_sentence("video0", "a car is shown"),
        msrvtt_sentence("video3", "people \u2028dance"),
    ],
}
MSRVTT_PARTS = {
    "train_val_videodatainfo.json": {
        "info": {"year": "2016"},
        "videos": [v for v in MSRVTT["videos"] if v["split"] != "test"],
        "sentences": MSRVTT["sentences"][1:],
    },
    "test_videodatainfo.json": {
        "videos": [v for v in MSRVTT["videos"] if v["split"] == "test"],
        "sentences": MSRVTT["sentences"][:1],
    },
}
MSRVTT_WANTED = {
    "video0": ("train", ["a car is shown", "a car is shown"]),
    "video1": ("val", ["a cat, they say"]),
    "video2": ("test", ["a man sings"]),
    "video3": ("train", ["people \u2028dance"]),
}
MSRVTT_LISTS = {
    "MSRVTT_data.json": MSRVTT,
    "MSRVTT_train.9k.csv": "video_id\r\nvideo0\r\nvideo1\r\n",
    "MSRVTT_train.7k.csv": "video_id\nvideo3\n",
    "MSRVTT_JSFUSION_test.csv": (
        "key,vid_key,video_id,sentence\n"
        'ret0,msr2,video2,"a man, ""the singer"", sings"\nret1,msr9,video9,a dog\n'
    ),
}
TESTED = {"video2": ("test", ['a man, "the singer", sings']), "video9": ("test", ["a dog"])}

MSVD_LISTS = {
    "train_list.txt": "-4wsuPCjDBc_5_15\n\n_UqqJdpVhhE_7_10.avi\n",
    "val_list.txt": "c_1_2\r\n",
    "test_list.txt": "d_1_2",
}
MSVD_TEXT = (
    "# MSR Video Description Corpus\n#id caption\n\n"
    "-4wsuPCjDBc_5_15 a squirrel is eating\n"
    "c_1_2 a man cooks\n"
    "-4wsuPCjDBc_5_15 a squirrel eats a nut\n"
    "_UqqJdpVhhE_7_10 un caf\u00e9\r\nd_1_2 #1 fan sings\n"
)
MSVD_WANTED = {
    "-4wsuPCjDBc_5_15": ("train", ["a squirrel is eating", "a squirrel eats a nut"]),
    "_UqqJdpVhhE_7_10": ("train", ["un caf\u00e9"]),
    "c_1_2": ("val", ["a man cooks"]),
    "d_1_2": ("test", ["#1 fan sings"]),
}
MSVD_TOKENS = {name: [text.split() for text in texts] for name, (_, texts) in MSVD_WANTED.items()}

VATEX = {
    "vatex_training_v1.0.json": [
        {"videoID": "G9zN5TTuGO4_000179_000189", "enCap": ["a", "b"], "chCap": ["\u732b"]},
        {"videoID": "a_b-c_d_e_f_000000_000010", "enCap": ["c"]},
    ],
    "vatex_validation_v1.0.json": [{"videoID": "x-_000005_000015", "enCap": ["d"]}],
    "vatex_public_test_english_v1.1.json": [{"videoID": "plain", "enCap": ["e"]}],
}
VATEX_WANTED = {
    "G9zN5TTuGO4_000179_000189": ("train", ["a", "b"]),
    "a_b-c_d_e_f_000000_000010": ("train", ["c"]),
    "x-_000005_000015": ("val", ["d"]),
    "plain": ("test", ["e"]),
}

FILM = "0001_American_Beauty_00.00.51.926-00.00.54.129"
OTHER_FILM = "1001_Flight_00.01.00.000-00.01.02.500"


def lsmdc_line(clip, sentence):
    return f"{clip}\t00.00.51.926\t00.00.54.129\t00.00.51.9\t00.00.54.1\t{sentence}\n"


LSMDC = {
    "LSMDC16_annos_training.csv": lsmdc_line(FILM, 'SOMEONE says "hi"\t& leaves.')
    + lsmdc_line(FILM, '"An open quote.'),
    "LSMDC16_annos_val.csv": lsmdc_line("b", "He runs.").replace("\n", "\r\n"),
    "LSMDC16_annos_test.csv": lsmdc_line("unused", "She waits."),
    "LSMDC16_challenge_1000_publictect.csv": lsmdc_line(OTHER_FILM, "It flies."),
}
LSMDC_WANTED = {
    FILM: ("train", ['SOMEONE says "hi"\t& leaves.', '"An open quote.']),
    "b": ("val", ["He runs."]),
    OTHER_FILM: ("test", ["It flies."]),
}

"""The paper's parameter counts, and the honest ones beside them."""

import json
import re
from dataclasses import asdict

import pytest
import torch
from waiting import once

from tokenmix_ops.video.blip import blip_vision_config, tiny_blip
from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.parameters import SETTINGS, Row, count, table
from tokenmix_ops.video.tuning import METHODS
from tokenmix_ops.video.tuning.full import TEXT_LAYERS

TOWER = {"vit-b16": 85_798_656, "vit-l16": 303_301_632}
# Width, depth and tokens of the towers; the text side is 12 layers of width 768.
SIZES = {"vit-b16": (768, 12), "vit-l16": (1024, 24)}
TEXT_WIDTH, WORDS, POSITIONS, EMBEDDING, PATCHES = 768, 30_524, 512, 256, 196

# Parameters of weight matrices, worked out by hand for ViT-B/16, and the paper's figures: of
# Table 1 and, for parts of a layer, Table 4; and of Table 2.
BY_HAND = {
    "token_mixing (P)": (7_077_888, 7.1, 7.07),
    "token_mixing, attention only": (2_359_296, 2.4, None),
    "token_mixing, FFN only": (4_718_592, 4.7, None),
    "token_mixing (F)": (12 * 7_077_888, None, None),
    "spatial (P)": (7_077_888, None, None),
    "spatial (F)": (12 * 7_077_888, None, None),
    "full": (32 * 7_077_888, 226.5, 226.51),
    "temporal": (4 * 7_077_888, 28.3, 28.31),
    "dual_attention, as the text says": (28_311_552, 84.9, None),
    "dual_attention, as the figure says": (84_934_656, 84.9, None),
    "st_adapter": (12 * (2 * 768 * 384 + 27 * 384**2), 54.8, None),
    "adapter, one a layer": (12 * 156_672, 1.9, 1.88),
    "adapter, two a layer": (24 * 156_672, 1.9, 1.88),
    "lora": (12 * 2 * 2 * 8 * 768, None, None),
    "frozen": (0, None, None),
}
BIASES = {"captioning": 283_196, "retrieval": 251_650}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Counted once for all processes that run tests."""

    def write(folder):
        (folder / "rows.json").write_text(json.dumps([asdict(row) for row in count()]))

    counted = json.loads((once(tmp_path_factory, "parameters", write) / "rows.json").read_text())
    return {(row["method"], row["backbone"], row["task"]): Row(**row) for row in counted}


def row_of(rows, method, backbone="vit-b16", task="captioning"):
    return rows[method, backbone, task]


def test_there_is_a_row_for_every_method_backbone_and_task(rows):
    names = [setting.name for setting in SETTINGS]
    assert len(set(names)) == len(names)
    assert {setting.tuning.method for setting in SETTINGS} == set(METHODS)
    assert set(BY_HAND) | {"bitfit"} == set(names)
    assert set(rows) == {
        (name, backbone, task)
        for name in names
        for backbone in TOWER
        for task in ("captioning", "retrieval")
    }


@pytest.mark.parametrize("task", ["captioning", "retrieval"])
@pytest.mark.parametrize("method", BY_HAND)
def test_the_counts_of_the_paper(rows, method, task):
    counted, table_1, table_2 = BY_HAND[method]
    row = row_of(rows, method, task=task)
    assert row.as_paper == counted
    assert row.paper == (table_1 if task == "captioning" else table_2)
    if row.paper is None:
        assert row.deviation_percent is None
    else:
        assert (
            abs(row.deviation_percent - 100 * (counted - row.paper * 1e6) / row.paper / 1e6) < 1e-9
        )


@pytest.mark.parametrize(
    ("method", "millions"),
    [
        ("token_mixing (P)", "7.08"),
        ("token_mixing, attention only", "2.36"),
        ("token_mixing, FFN only", "4.72"),
        ("temporal", "28.31"),
        ("full", "226.49"),
        ("st_adapter", "54.85"),
        ("adapter, one a layer", "1.88"),
        ("adapter, two a layer", "3.76"),
        ("dual_attention, as the text says", "28.31"),
        ("dual_attention, as the figure says", "84.93"),
        ("bitfit", "0.28"),
    ],
)
def test_the_figures_of_the_issue(rows, method, millions):
    assert f"{row_of(rows, method).as_paper / 1e6:.2f}" == millions


@pytest.mark.parametrize("task", BIASES)
def test_bitfit_is_all_biases_of_the_model(rows, task):
    row = row_of(rows, "bitfit", task=task)
    assert row.as_paper == row.total == BIASES[task]
    # Twelve layers of 4 + 4 + 1 + 2 widths, and the patches' and the last norm's.
    assert row.visual == 12 * 11 * 768 + 2 * 768
    assert row.paper == {"captioning": 0.3, "retrieval": 0.26}[task]


def test_the_printed_figures_are_met_to_the_last_digit_or_explained(rows):
    for row in rows.values():
        if row.paper is None:
            continue
        digits = len(f"{row.paper:g}".partition(".")[2])
        met = round(row.as_paper / 1e6, digits) == row.paper
        assert met or row.note, row.method
        assert row.backbone == "vit-b16"


def text_side(task, width):
    """Parameters of the text side by its architecture."""
    d, layers = TEXT_WIDTH, 12
    attention = 4 * (d * d + d) + 2 * d
    crossing = 2 * (d * d + d) + 2 * (width * d + d) + 2 * d
    ffn = d * 4 * d + 4 * d + 4 * d * d + d + 2 * d
    body = layers * (attention + crossing + ffn) + (WORDS + POSITIONS + 2) * d
    return body + heads(task, width)


def heads(task, width):
    d = TEXT_WIDTH
    if task == "captioning":
        return d * d + d + 2 * d + WORDS
    return (width + 1) * EMBEDDING + (d + 1) * EMBEDDING + 2 * (d + 1)


@pytest.mark.parametrize("task", ["captioning", "retrieval"])
@pytest.mark.parametrize("backbone", TOWER)
def test_the_honest_counts(rows, backbone, task):
    width, depth = SIZES[backbone]
    norms = 4 * width
    layer = 12 * width**2 + 9 * width + norms
    below = width * 3 * 16**2 + width + width + (1 + PATCHES) * width
    top = 2 * width
    attention = 4 * width**2 + 4 * width
    ffn = layer - attention - norms
    bottleneck, half = width // 8, width // 2
    adapter = 2 * width * bottleneck + bottleneck**2 + 2 * bottleneck + width
    st_adapter = 2 * width * half + half + width + 27 * half**2 + half
    # With biases and norms; LP and the final norm come to all of them.
    parts = {
        "token_mixing (P)": layer,
        "token_mixing, attention only": attention + norms // 2,
        "token_mixing, FFN only": ffn + norms // 2,
        "spatial (P)": layer,
        "temporal": 4 * layer,
        "dual_attention, as the text says": depth * (attention + 1),
        "dual_attention, as the figure says": depth * (attention + 1 + ffn + norms // 2),
        "st_adapter": depth * st_adapter,
        "adapter, one a layer": depth * adapter,
        "adapter, two a layer": 2 * depth * adapter,
        "lora": depth * 2 * 2 * 8 * width,
    }
    for method, own in parts.items():
        row = row_of(rows, method, backbone, task)
        assert row.visual == own + below + top, method
        assert row.text == heads(task, width), method
    for method in ("token_mixing (F)", "spatial (F)", "full"):
        row = row_of(rows, method, backbone, task)
        assert row.visual == TOWER[backbone] + (4 * layer if method == "full" else 0)
        assert row.text == text_side(task, width)
    for row in rows.values():
        assert row.total == row.visual + row.text
        assert row.checkpoint_mb == 4 * row.total / 1e6
    assert row_of(rows, "frozen", backbone, task).total == 0


def test_a_captioners_visual_part_is_28_mb(rows):
    assert round(row_of(rows, "token_mixing (P)").as_paper * 4 / 1e6) == 28


@pytest.mark.parametrize("backbone", TOWER)
def test_the_towers_themselves(backbone):
    with torch.device("meta"):
        tower = VideoEncoder(blip_vision_config(backbone))
    assert sum(p.numel() for p in tower.parameters()) == TOWER[backbone]


def test_the_papers_figures_come_with_a_word_where_it_disagrees_with_itself(rows):
    assert "truncates it to 7.07" in row_of(rows, "token_mixing (P)", task="retrieval").note
    for reading in ("text", "figure"):
        note = row_of(rows, f"dual_attention, as the {reading} says").note
        assert "only the temporal attention" in note
    assert "paper counts one" in row_of(rows, "adapter, two a layer").note
    assert row_of(rows, "token_mixing (P)", "vit-l16").note == ""
    assert row_of(rows, "lora", "vit-l16").note == "not in the paper"


def test_one_backbone_and_task_can_be_asked_for(rows):
    some = count("vit-b16", "retrieval")
    wanted = [row for row in rows.values() if (row.backbone, row.task) == ("vit-b16", "retrieval")]
    assert some == wanted
    with pytest.raises(
        ValueError, match="expected backbone to be one of 'vit-b16', 'vit-l16', got 'x'"
    ):
        count("x")
    with pytest.raises(
        ValueError, match="expected task to be 'captioning' or 'retrieval', got 'x'"
    ):
        count("vit-b16", "x")


def test_rows_survive_json(rows):
    some = list(rows.values())
    read = json.loads(json.dumps([asdict(row) for row in some]))
    assert [Row(**row) for row in read] == some


def test_the_table_has_a_line_for_every_row(rows):
    text = table(list(rows.values()))
    assert re.findall(r"^### (.*)$", text, re.MULTILINE) == [
        f"{backbone}, {task}" for backbone in TOWER for task in ("captioning", "retrieval")
    ]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {9}
    assert len(lines) == len(rows) + 2 * 4
    start = "| temporal | 28.312 | 28.3 | +0.0 % | 29.096 | 0.623 | 29.718 | 118.9 |"
    assert any(line.startswith(start) for line in lines)
    assert any(line.startswith("| spatial (P) | 7.078 | – | – | 7.832 |") for line in lines)
    assert "| full | 226.492 | 226.51 | +0.0 % |" in text
    notes = [line for line in text.splitlines() if line.startswith("- ")]
    assert notes == [f"- {row.method}: {row.note}" for row in rows.values() if row.note]


@pytest.mark.interfaces
@pytest.mark.parametrize("task", ["captioning", "retrieval"])
def test_layers_of_texts_are_where_they_are_counted(task):
    with torch.device("meta"):
        model = tiny_blip(task, 110)
    layers = {n.partition(".layer.")[0] for n, _ in model.named_parameters() if ".layer." in n}
    assert {f"{name}.layer." for name in layers} < {*TEXT_LAYERS}

"""Leaves out what the machine lacks the packages for, and says so."""

from importlib.util import find_spec

NEEDED = {
    "test_blip.py": ("transformers",),
    "test_cli.py": ("av", "matplotlib", "rich", "tyro"),
    "test_clips.py": ("av",),
    "test_dataset.py": ("av",),
    "test_encoder.py": ("transformers",),
    "test_hub.py": ("huggingface_hub",),
    "test_image_folder.py": ("av",),
    "test_shapes.py": ("av",),
    "test_text.py": ("transformers",),
    "test_video_errors.py": ("av",),
    "test_video_file.py": ("av",),
    "test_weights.py": ("transformers",),
}
MISSING = {
    file: absent
    for file, packages in NEEDED.items()
    if (absent := [package for package in packages if find_spec(package) is None])
}
collect_ignore = list(MISSING)


def pytest_report_header():
    return [f"left out: tests/video/{file}, no {', '.join(n)}" for file, n in MISSING.items()]

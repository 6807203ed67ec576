"""docs/troubleshooting.md names messages that the program really has, and has a row for each of the front door's."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CELLS = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
ROWS = [message for cell in CELLS for message in re.findall(r"`(.+?)`", cell)]
FRONT_DOOR = (
    *(
        "cli.py",
        "command_line.py",
        "config/*.py",
        "configure.py",
        "ranks.py",
        "start.py",
        "train.py",
        "run/*.py",
        "data/*.py",
    ),
    *("downstream/*.py", "interop/command.py", "interop/export.py", "interop/graph.py", "interop/import_weights.py"),
    *("interop/model_card.py", "masks/config.py", "model/config.py", "optim/schedules.py", "report/*.py"),
    *("step/options.py", "weights/*.py"),
)
"""Modules whose errors people meet who only use the commands."""
WITHIN = {
    "its header is cut off",
    "it has no checksum",
    "its metadata are none of a checkpoint, but ...",
    "its step is no number of steps, but ...",
    "it says that it was written after step ...",
    "it holds no settings, but ...",
    "image ... of ...",
    "asked to stop while a batch was awaited",
    "asked to stop while a batch was decoded",
    "rank ... of ... does not exist",
    "the global batch must hold at least one image, got ...",
    "the shuffle buffer must hold at least one image, got ...",
    "an encoder (VisionTransformer) is needed, got ......",
    "the layer norms of an encoder must have one eps, got ...",
}
"""The ends of other messages (``... is damaged or not a safetensors file: ...``), and what no command brings about."""


def test_every_message_is_one_of_the_program():
    files = [*ROOT.glob("ijepa_fast/**/*.py"), ROOT / "setup.py", ROOT / "tools" / "environment.py"]
    # Strings that go on in the next line are joined.
    source = re.sub(r'"\s*\n\s*f?r?"', "", "\n".join(path.read_text() for path in files))
    assert len(ROWS) > 25
    missing = [part for row in ROWS for part in row.split("...") if part.strip() not in source]
    assert not missing


def messages(path: Path) -> list[str]:
    """The texts that a module raises, with ... for what is put in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
            continue
        text = node.exc.args[0]
        parts = text.values if isinstance(text, ast.JoinedStr) else [text]
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts)
        if len(re.sub(r"[.;: ]", "", text)) > 4 and text not in WITHIN:
            found.append(text)
    return found


def test_every_message_of_the_front_door_has_a_row():
    paths = [path for pattern in FRONT_DOOR for path in sorted((ROOT / "ijepa_fast").glob(pattern))]
    texts = [(path, text) for path in paths for text in messages(path)]
    assert len(paths) > 30 and len(texts) > 100
    parts = [[part.strip() for part in row.split("...") if part.strip()] for row in ROWS]
    missing = [f"{path.relative_to(ROOT)}: {text}" for path, text in texts
               if not any(all(part in text for part in row) for row in parts)]  # fmt: skip
    assert not missing, "\n".join(missing)

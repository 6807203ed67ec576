"""docs/troubleshooting.md names messages that the program really has."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_message_is_one_of_the_program():
    files = [*ROOT.glob("ijepa_fast/**/*.py"), ROOT / "setup.py", ROOT / "tools" / "environment.py"]
    # Strings that go on in the next line are joined.
    source = re.sub(r'"\s*\n\s*f?r?"', "", "\n".join(path.read_text() for path in files))
    rows = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 25
    missing = [part for row in rows for part in row.split("...") if part.strip() not in source]
    assert not missing

"""Commands in processes of their own, each with a limit, and one results file that holds what became of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ijepa_fast.bench.measure import save
from ijepa_fast.run.environment import machine

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 5
"""Nothing is begun with less time than this."""
TAIL_LINES = 25


@dataclass
class Run:
    """One run of the driver.

    Attributes:
        report: what is written to ``path``.
        deadline: of the current part, by ``time.monotonic``.
        scratch: folder for what processes leave behind: logs, their own JSON, test reports.
        steps: words that the whole steps to time must have.
        whole: whether this part is one of a whole run.
        earlier: the entry of the current part that an earlier run left; empty if there is none.
    """

    device: str
    tiny: bool
    path: Path
    scratch: Path
    steps: str = ""
    whole: bool = False
    earlier: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    deadline: float = float("inf")
    lock: threading.Lock = field(default_factory=threading.Lock)

    def save(self) -> None:
        with self.lock:
            save(self.path, self.report)

    def note(self, table: dict[str, Any], name: str, value: Any) -> None:
        """Put a value into a table of the report, and save. Commands run beside one another: none may change a table
        while another one writes the file."""
        with self.lock:
            table[name] = value
        self.save()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def begin(self, part: str, seconds: float) -> dict[str, Any]:
        """An entry for the part, in place of what an earlier run left there."""
        self.deadline = time.monotonic() + seconds
        entry: dict[str, Any] = {"machine": machine(self.device), "commands": {}}
        self.earlier = self.report["parts"].get(part, {})
        self.report["parts"][part] = entry
        self.save()
        return entry

    def execute(
        self, entry: dict[str, Any], name: str, command: Sequence[str], limit: float = float("inf"), **environment: str
    ) -> int | None:
        """Run a command within what is left of the part, and ``limit``. Its exit status; None if it was stopped."""
        seconds = min(self.left(), limit)
        if seconds < LEAST_SECONDS:
            self.note(entry["commands"], name, {"not_run": "no time was left"})
            return None
        log, started = self.log(name), time.monotonic()
        environment = {**os.environ, **environment}
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = None
        took = round(time.monotonic() - started, 1)
        result = {"exit_status": status, "seconds": took} if status is not None else {"stopped_after_s": took}
        self.note(entry["commands"], name, result)
        print(f"--- {name}: {'stopped' if status is None else f'exit status {status}'} after {took} s", flush=True)
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join(lines[-TAIL_LINES if status == 0 else -3 * TAIL_LINES :]), flush=True)
        return status

    def measure(
        self, entry: dict[str, Any], name: str, command: Sequence[str], file: str = "", limit: float = float("inf")
    ) -> dict[str, Any] | None:
        """Run a command that writes JSON. Its report, however far it came; without the name of a ``file`` it joins the
        entry's "reports"."""
        path = self.scratch / (file or f"{re.sub('[^a-z0-9_]+', '-', name.lower())}.json")
        self.execute(entry, name, [*command, "--json", str(path)], limit)
        try:
            report = json.loads(path.read_text()) if path.exists() else None
        except ValueError as problem:
            self.note(entry["commands"], f"results of {name}", {"not_run": f"they are no JSON: {problem}"})
            report = None
        if report and not file:
            entry["reports"].append(report)
            self.save()
        return report

    def log(self, name: str) -> Path:
        """The file with the output of a command."""
        return self.scratch / f"{re.sub('[^A-Za-z0-9]+', '-', name)}.log"

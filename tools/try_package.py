"""Install a wheel or an sdist into an empty environment and use it there, outside of any checkout.

    python tools/try_package.py "dist/*.whl" [arguments for pip install ...]

Runs a short demo, then probe, export and report. Standard library only.
"""

import glob
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

COMMANDS = (
    "pretrain --config demo --output run --train.steps 20 --train.save_every 20 --train.log_every 10"
    " --evaluation.images [200,200] --loader.workers 0",
    "probe run",
    "export run --to safetensors --out encoder.safetensors",
    "report run",
    "doctor",
)


def main() -> None:
    (package,) = map(os.path.abspath, glob.glob(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder, "environment"), with_pip=True)
        programs = Path(folder, "environment", "Scripts" if os.name == "nt" else "bin")
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}

        def run(program: str, *arguments: str) -> None:
            print("$", program, *arguments, flush=True)
            subprocess.run([str(programs / program), *arguments], cwd=folder, env=environment, check=True)

        run("python", "-m", "pip", "install", "--quiet", f"{package}[train]", *sys.argv[2:])
        for command in COMMANDS:
            run("ijepa-fast", *command.split())
        written = ("run/summary.json", "run/pca.png", "run/report.html", "encoder.safetensors")
        missing = [name for name in written if not Path(folder, name).exists()]
        sys.exit(f"not written: {', '.join(missing)}" if missing else 0)


if __name__ == "__main__":
    main()

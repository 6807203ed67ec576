"""Builds csrc/ into ijepa_fast/ of this checkout (`make ext`) and loads what was built; arguments go to build_ext."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    os.chdir(ROOT)
    os.environ["IJEPA_FAST_BUILD_EXT"] = "1"
    sys.argv = ["setup.py", "build_ext", "--inplace", *sys.argv[1:]]
    runpy.run_path("setup.py", run_name="__main__")
    code = "import sys; from ijepa_fast.masks import extension; sys.exit(extension.reason('cpu'))"
    if subprocess.run([sys.executable, "-c", code]).returncode:
        sys.exit("the extension was built but is not used (above)")
    print("built: ijepa-fast doctor says what uses it")

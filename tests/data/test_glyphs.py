"""The fonts of the rendered characters."""

import os
import subprocess
import sys
from pathlib import Path

from data.glyphs import FACES, font_folder

ROOT = Path(__file__).resolve().parent.parent.parent


def test_fonts_are_found_whatever_mplbackend_says():
    """matplotlib cannot be imported under such a name; its files are there all the same."""
    code = "from data.glyphs import _font; print(_font('DejaVuSans').size)"
    environment = os.environ | {"MPLBACKEND": "nonsense"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "44", done.stderr[-500:]
    assert all((font_folder() / f"{face}.ttf").is_file() for face in FACES)

"""The table of evictors in README.md is what the code says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_is_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "policy_table.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

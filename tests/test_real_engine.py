"""The real CPU engine is part of the set-up: where it is missing these tests fail."""

import subprocess
import sys


def test_engine_check_generates_responses_of_the_asked_lengths() -> None:
    command = [sys.executable, "-m", "simrl.real_backend.engine_check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "response lengths [5, 12, 31, 32] in 32 iterations" in done.stdout

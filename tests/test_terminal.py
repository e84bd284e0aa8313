import os
import shlex
import subprocess
import sys

from shared_modules.terminal import write_line


class Stream:
    def __init__(self):
        self.written = []

    def write(self, text):
        self.written.append(text)

    def flush(self):
        self.written.append("flushed")


def test_a_line_is_written_in_one_piece():
    stream = Stream()
    write_line("meeting.wav  12.0 s", stream)
    assert stream.written == ["meeting.wav  12.0 s\n", "flushed"]


def test_processes_that_share_a_pipe_do_not_mix_their_lines():
    """``print`` does, where Python does not buffer."""
    code = "from shared_modules.terminal import write_line\nfor _ in range(50_000): write_line('a line')"
    command = shlex.join([sys.executable, "-c", code])
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    both = subprocess.run(f"{command} & {command}; wait", shell=True, capture_output=True, text=True, env=environment)
    assert both.stderr == ""
    assert both.stdout.splitlines() == ["a line"] * 100_000

"""Output that nobody reads to its end, as under `| head`, ends a command without noise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY, clean_environment, write_data

from mltfr_dist.errors import EXIT_UNREAD, quiet_pipe

MLTFR = [sys.executable, "-c", "import sys; from mltfr_dist.cli import main; sys.exit(main())"]


def unread(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run the real command into a pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [*MLTFR, *arguments],
            stdout=writer,
            stderr=subprocess.PIPE,
            env=clean_environment(),
            cwd=REPOSITORY,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writer)


def test_commands_end_quietly(tmp_path: Path) -> None:
    data = write_data(tmp_path)
    done = unread("inspect", str(data))
    assert (done.returncode, done.stderr) == (EXIT_UNREAD, b"")
    done = unread("--help")  # argparse lets a pipe that is not buffered break unseen
    assert done.returncode in (0, EXIT_UNREAD)
    assert done.stderr == b""


def test_a_preparation_that_is_not_listened_to_goes_on_later(tmp_path: Path) -> None:
    source = tmp_path / "raw.csv"
    rows = "".join(f"u{n % 9},i{n % 7},{n}\n" for n in range(300))
    source.write_text("user_id,item_id,timestamp\n" + rows)
    command = ["prepare", str(source), str(tmp_path / "out")]
    done = unread(*command)
    assert (done.returncode, done.stderr) == (EXIT_UNREAD, b"")
    assert not (tmp_path / "out").exists()
    subprocess.run([*MLTFR, *command], env=clean_environment(), cwd=REPOSITORY, check=True)
    assert (tmp_path / "out" / "manifest.json").exists()


def test_errors_keep_their_message_and_code(tmp_path: Path) -> None:
    done = unread("inspect", str(tmp_path))
    assert done.returncode == 2
    assert b"holds neither prepared data nor" in done.stderr


def test_a_connection_that_breaks_is_no_pipe_of_ours() -> None:
    with Path(os.devnull).open("w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(BrokenPipeError), quiet_pipe():
            raise BrokenPipeError

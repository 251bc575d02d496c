"""README typed in its order, on small inputs: every command of it runs, or stands below with the
reason why not.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from support import REPOSITORY, clean_environment

sys.path.insert(0, str(REPOSITORY / "tests" / "unit" / "tables"))
from table_files import table, write_gguf, write_single, write_tokenizer

from mltfr_dist.cli import build_parser

README = (REPOSITORY / "README.md").read_text()
LANGUAGES = {"bash", "console", "text"}
"""bash: every line is typed; console: what stands behind `$ ` is; text: nothing is."""

TINY = (
    " data.max_len=10 backbone.hidden_dim=16 training.epochs=1 training.consensus_epochs=1"
    " training.threads=1 mltfr.filter.top_k=4 mltfr.filter.shortlist_size=20"
    " mltfr.consensus.fisher_sequences=20 'baselines=[]'"
)
NOT_RUN = {
    "make quick": "installs everything anew; docs/first-steps.md is a log of it",
    "make test": "it is this",
    "make sweep-demo": "12 trials: minutes; tests/distributed/test_sweep.py runs sweeps",
    "mltfr prepare beauty data/beauty --download": "downloads",
    "mltfr tables Qwen/Qwen3-0.6B": "downloads",
    "sbatch": "needs Slurm: tests/slurm submits the same scripts",
}
"""Beginning of a command: why it is not typed here."""

SUBSTITUTES = (
    (r"^make demo$", f"python train.py --preset demo{TINY}".replace("=[]", "=[backbone]")),
    (r"^deepspeed (.*)$", rf"deepspeed --num_gpus 2 --master_port $PORT \1{TINY}"),
    (r"^(python train.py .*) --print-config", rf"\1{TINY} --print-config"),
    (r"^(python train.py --preset sasrec_beauty .*)$", rf"\1 data.path=data/mine{TINY}"),
    ("--nproc_per_node 8", "--standalone --nproc_per_node 2"),
    (r"^(mltfr sweep everything .*)$", r"\1 --dry-run"),
)
"""What is typed in place of it: less of everything, and what the machine decides."""


class Command(NamedTuple):
    line: str
    typed: str
    """With substitutes; empty where it is not run."""


def blocks() -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[Command]:
    result = []
    for language, text in blocks():
        for line in text.splitlines() if language != "text" else ():
            typed = re.sub(r"\s+# .*$", "", line if language == "bash" else line[2:]).strip()
            if not typed or (language == "console" and not line.startswith("$ ")):
                continue
            line, typed = typed, re.sub(r" {2,}", " ", typed)
            for pattern, by in SUBSTITUTES:
                typed = re.sub(pattern, by, typed)
            skipped = any(typed.startswith(beginning) for beginning in NOT_RUN)
            result.append(Command(line, "" if skipped else typed))
    return result


def test_every_block_says_whether_it_is_typed() -> None:
    assert len(blocks()) > 7
    assert {language for language, _ in blocks()} == LANGUAGES


def test_every_command_runs_or_has_a_reason() -> None:
    """One that is in neither list is typed below, and fails there if it cannot be."""
    lines = [re.sub(r" {2,}", " ", command.line) for command in commands()]
    assert len(lines) > 20
    for beginning in NOT_RUN:
        assert any(line.startswith(beginning) for line in lines), f"{beginning} is gone"
    for pattern, _ in SUBSTITUTES:
        assert any(re.search(pattern, line) for line in lines), f"{pattern} is gone"


@pytest.mark.parametrize("line", re.findall(r"`(mltfr [a-z][^`]*)`", README))
def test_commands_within_sentences_exist(line: str) -> None:
    (choices,) = (a.choices for a in build_parser()._actions if a.dest == "command")
    assert choices is not None
    assert line.split()[1] in choices


def test_the_environment_is_activated_before_its_programs_are_typed() -> None:
    lines = [command.line for command in commands()]
    active = lines.index("source .venv/bin/activate")
    first = next(
        place
        for place, line in enumerate(lines)
        if line.split()[0] in ("mltfr", "deepspeed", "torchrun", "python", "tensorboard")
    )
    assert active < first
    made = next(place for place, line in enumerate(lines) if line.endswith("> mine.yaml"))
    assert all(place > made for place, line in enumerate(lines) if "--config mine.yaml" in line)


def test_make_says_what_is_typed_next() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    assert "source $(VENV)/bin/activate" in makefile
    for target in ("quick", "demo"):
        recipe = makefile.partition(f"\n{target}: ")[2].partition("\n\n")[0]
        assert "$$NEXT" in recipe.splitlines()[-1], target


def write_inputs(folder: Path) -> None:
    """What README takes for granted: a user's own files, and in small what `make quick` has
    fetched.
    """
    rng = np.random.default_rng(0)
    names = [*range(1, 40), 50, 172, 181]
    rows = []
    for user in range(60):
        start = int(rng.integers(len(names)))
        rows += [
            (user, names[(start + place) % len(names)], 1_600_000_000 + place)
            for place in range(int(rng.integers(8, 16)))
        ]
    users, items, times = (list(column) for column in zip(*rows, strict=True))
    events = pa.table({"user": users, "sku": items, "ts": times})
    pa.parquet.write_table(events, folder / "events.parquet")
    histories = [[str(i) for u, i, _ in rows if u == user] for user in range(60)]
    table_of_users = pa.table({"user_id": list(range(60)), "history": histories})
    pa.parquet.write_table(table_of_users, folder / "users.parquet")
    lists = [
        " ".join(str(word) for word in (user, *(i for u, i, _ in rows if u == user)))
        for user in range(60)
    ]
    (folder / "sequences.txt").write_text("\n".join(lists) + "\n")
    with zipfile.ZipFile(folder / "ml-1m.zip", "w") as archive:
        ratings = "".join(f"{user + 1}::{item}::5::{time}\n" for user, item, time in rows)
        archive.writestr("ml-1m/ratings.dat", ratings)
    tokens = ["<s>", *(f"Ġ{a}{b}x" for a in "abcdefgh" for b in "ijklmnop")]
    for name in ("Llama-3.2-1B", "llama2", "smollm2", "minilm"):
        write_single(folder / name, table(len(tokens), 32, len(name)))
        write_tokenizer(folder / name, tokens)
    rows_of = table(len(tokens), 32, 9)
    kind = gguf.GGMLQuantizationType.Q8_0
    types = [3, *[1] * (len(tokens) - 1)]
    write_gguf(folder / "model.Q8_0.gguf", rows_of, kind, tokens, types)


FETCHED = """
mltfr prepare sequences.txt data/ml-100k --format sequences
for name in llama2 smollm2 minilm; do mltfr tables ./$name --name $name; done
"""


@pytest.mark.integration
@pytest.mark.timeout(3000)
def test_readme_typed_in_its_order(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    for name in ("train.py", "tuning", "slurm", "ds_configs", "Makefile"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    lines = ["set -e"]
    for number, command in enumerate(commands()):
        if command.typed:
            lines += [f"echo '@@ {number}'", command.typed]
        if command.line.startswith("source"):
            lines.append(FETCHED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bare = os.pathsep.join(  # nothing of the environment is found before it is activated
        block
        for block in os.environ["PATH"].split(os.pathsep)
        if not (Path(block) / "mltfr").exists()
    )
    environment = clean_environment(PATH=bare, PORT=str(port), DS_ACCELERATOR="cpu")
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2900,
    )
    last = int(re.findall(r"^@@ (\d+)$", done.stdout, re.MULTILINE)[-1])
    assert done.returncode == 0, f"{commands()[last].typed}\n{done.stdout[-6000:]}"
    assert len(re.findall(r"^@@ ", done.stdout, re.MULTILINE)) == sum(
        bool(command.typed) for command in commands()
    )
    for place in ("runs/demo/report.md", "runs/mine/report.md", "runs/other/report.md"):
        assert (tmp_path / place).exists(), place
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert "What the token filter keeps for this history" in done.stdout

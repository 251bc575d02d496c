import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mltfr_dist.config import TableConfig
from mltfr_dist.errors import DataError
from mltfr_dist.tables.info import read_info
from mltfr_dist.tables.partial import partial_folder
from mltfr_dist.tables.store import TableInfo, load_table, save_table, table_hash


def random_rows(num_rows: int = 300, dim: int = 8, *, offset: float = 2.0) -> torch.Tensor:
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1))
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(0)) @ mix + offset


def save(output: Path, rows: torch.Tensor, name: str = "small", **changed: object) -> TableInfo:
    described: dict[str, object] = {
        "name": name,
        "source_files": ("model.safetensors",),
        "source_sha256": "0" * 64,
        "tensor": "wte.weight",
        "source_dtype": "F32",
        "source_rows": len(rows) + 3,
        "vocabulary_file": "tokenizer.json",
        "licence": None,
        "dropped": {"special": 3},
        "mean_cosine_before": 0.5,
        "mean_cosine_after": 0.0,
        "config": TableConfig(),
    }
    return save_table(
        output, rows, [f" tökén{index}" for index in range(len(rows))], **(described | changed)
    )


# --- saving and loading


def test_round_trip(tmp_path: Path) -> None:
    rows = random_rows()
    info = save(tmp_path / "tables", rows)
    table = load_table(tmp_path / "tables" / "small")
    assert table.name == "small"
    assert torch.equal(table.rows, rows)
    assert table.info == info
    assert table.vocabulary[7] == " tökén7"
    assert len(table.vocabulary) == info.num_rows == 300
    assert table_hash(table.rows) == info.rows_sha256
    assert sorted(file.name for file in (tmp_path / "tables").iterdir()) == [
        "small"
    ]  # nothing partial is left


def test_table_hash_sees_one_changed_bit_and_not_the_layout() -> None:
    rows = random_rows()
    changed = rows.clone()
    changed[299, 7] = torch.nextafter(changed[299, 7], torch.tensor(9.0))
    assert table_hash(rows) == table_hash(rows.T.contiguous().T)
    assert table_hash(rows) != table_hash(changed)


def test_bytes_are_deterministic_and_readable_by_others(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save(tmp_path / folder, random_rows())
    for name in ("table.safetensors", "vocabulary.json", "table.json"):
        assert (tmp_path / "a/small" / name).read_bytes() == (
            tmp_path / "b/small" / name
        ).read_bytes()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "a/small").iterdir()}
    assert len(modes) == 1


def test_equal_table_is_kept_and_another_refused(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    written = (tmp_path / "small/table.safetensors").stat().st_mtime_ns
    save(tmp_path, random_rows())
    assert (tmp_path / "small/table.safetensors").stat().st_mtime_ns == written
    with pytest.raises(
        DataError, match=r"already holds a different table \(differing: table_sha256, rows_sha256\)"
    ):
        save(tmp_path, random_rows(offset=1.0))
    assert torch.equal(load_table(tmp_path / "small").rows, random_rows())
    assert [file.name for file in tmp_path.iterdir()] == ["small"]


def test_damaged_table_is_not_mistaken_for_an_equal_one(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    (tmp_path / "small/vocabulary.json").write_text("[]")
    with pytest.raises(DataError, match="is no sound token table"):
        save(tmp_path, random_rows())


def test_rows_and_tokens_must_agree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="300 rows but 2 tokens"):
        save_table(tmp_path, random_rows(), ["a", "b"], name="x")


# VmHWM, not ru_maxrss, which starts at the parent's size in a child and would hide any growth.
PLACE = """
import sys
from pathlib import Path
from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.placement import place_tables
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.tables.store import load_table

def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

folders = [Path(name) for name in sys.argv[2:]]
config = RunConfig(data={"path": "d"}, mltfr={"tables": folders, "placement": sys.argv[1]})
before = peak()
tables = [load_table(folder) for folder in folders]
placed = place_tables(config, tables, ALONE)
print(peak() - before)
assert all(p.rows.equal(t.rows) for p, t in zip(placed, tables))
"""


def test_replicated_tables_are_held_once(tmp_path: Path) -> None:
    rows, names = torch.randn(20_000, 256), [f"t{i}" for i in range(4)]  # 82 MB together
    for name in names:
        save(tmp_path, rows, name=name)
    command = [sys.executable, "-c", PLACE, "replicated", *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 82 < int(done.stdout) / 1e6 < 82 + 20  # the vocabulary's tokens among them


def test_rows_are_mapped_from_the_file_and_writes_do_not_reach_it(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    table = load_table(tmp_path / "small")
    with Path("/proc/self/maps").open() as maps:
        assert str(tmp_path / "small" / "table.safetensors") in maps.read()
    table.rows.zero_()
    load_table(tmp_path / "small")  # the hash is still right


# --- what load_table refuses


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no token table: it has no table\.json.*mltfr tables"):
        load_table(tmp_path / "none")
    save(tmp_path, random_rows())
    with pytest.raises(
        DataError, match=rf"The tables in {tmp_path} are small; did you mean {tmp_path}/small\?"
    ):
        load_table(tmp_path / "smal")
    (tmp_path / "small/table.safetensors").unlink()
    with pytest.raises(DataError, match=r"has no table\.safetensors"):
        load_table(tmp_path / "small")


def edit_header(folder: Path, **changes: object) -> None:
    header = json.loads((folder / "table.json").read_text())
    (folder / "table.json").write_text(json.dumps(header | changes))


def test_wrong_schema_version(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    edit_header(tmp_path / "small", schema_version=3)
    with pytest.raises(DataError, match="has schema version 3; this program reads 1, 2"):
        load_table(tmp_path / "small")


def test_every_flipped_bit_of_the_description_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    path = tmp_path / "small/table.json"
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8  # all of them: the same, eight times as long
        path.write_bytes(changed)
        with pytest.raises(DataError, match=r"table\.json"):
            read_info(tmp_path / "small")


@pytest.mark.parametrize(
    "changes",
    [
        {"mean_cosine_before": 0.51},
        {"dropped": {"special": 4}},
        {"licence": "mit"},
        {"info_sha256": None},
        {"schema_version": 1},
        {"config": {"normalise": "none"}},
    ],
)
def test_an_edited_description_is_noticed(tmp_path: Path, changes: dict[str, object]) -> None:
    save(tmp_path, random_rows())
    edit_header(tmp_path / "small", **changes)
    with pytest.raises(DataError, match=r"table\.json was changed after it was written"):
        load_table(tmp_path / "small")


def test_tables_of_the_first_version_still_load_and_are_kept(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    path = tmp_path / "small/table.json"
    header = json.loads(path.read_text()) | {"schema_version": 1}
    del header["info_sha256"]
    path.write_text(json.dumps(header))
    assert torch.equal(load_table(tmp_path / "small").rows, random_rows())
    save(tmp_path, random_rows())  # the same table
    assert json.loads(path.read_text()) == header


def test_the_bytes_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    for num_rows, dim in ((300, 8), (7, 3), (12345, 1)):
        rows = random_rows(num_rows, dim)
        save(tmp_path, rows, name=f"t{num_rows}")
        save_file({"token_table": rows}, tmp_path / "reference")
        written = (tmp_path / f"t{num_rows}/table.safetensors").read_bytes()
        assert written == (tmp_path / "reference").read_bytes()


def test_a_token_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"The token of row 1, '\\ud800', is no valid text"):
        save_table(tmp_path, random_rows(2), ["a", "\ud800"], name="x")


# --- what interrupted extractions leave


def leftover(output: Path, host: str, pid: int) -> Path:
    folder = output / f".small.partial-{host}-{pid}"
    folder.mkdir(parents=True)
    (folder / "table.safetensors").write_bytes(b"part")
    return folder


def test_leftovers_of_dead_processes_are_removed_and_others_kept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = socket.gethostname()
    gone = [leftover(tmp_path, here, pid) for pid in (dead.pid, os.getpid())]
    (tmp_path / f".small.partial-{dead.pid}").mkdir()  # as before there was a host in the name
    kept = [
        leftover(tmp_path, here, living.pid),
        leftover(tmp_path, "elsewhere", dead.pid),
        tmp_path / f".smaller.partial-{here}-{dead.pid}",
        tmp_path / ".small.partial-mine",
    ]
    for folder in kept[2:]:
        folder.mkdir()
    try:
        save(tmp_path, random_rows())
    finally:
        living.communicate(b"\n")
    assert not any(folder.exists() for folder in gone)
    assert {file.name for file in tmp_path.iterdir()} == {"small", *(k.name for k in kept)}


def test_a_later_process_of_the_same_number_does_not_keep_a_leftover(tmp_path: Path) -> None:
    left = leftover(tmp_path, socket.gethostname(), os.getppid())
    os.utime(left, (0, 0))  # made before that process began
    save(tmp_path, random_rows())
    assert not left.exists()


def test_a_leftover_that_is_held_is_kept(tmp_path: Path) -> None:
    """As by a process in another container, whose number means nothing here."""
    with partial_folder(tmp_path, "small", print) as folder:
        dead = folder.rename(tmp_path / f".small.partial-{socket.gethostname()}-99999999")
        save(tmp_path, random_rows())
        assert dead.exists()
    save(tmp_path, random_rows())
    assert not dead.exists()


def test_a_killed_extraction_leaves_nothing_after_the_next(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mltfr_dist.tables.store import new_table\n"
        "with new_table(Path(sys.argv[1]), 'small', 300, 8):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert [file.name[:15] for file in tmp_path.iterdir()] == [".small.partial-"]
    save(tmp_path, random_rows())
    assert [file.name for file in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("content", ["{", '{"schema_version": 1}', "[]"])
def test_malformed_header(tmp_path: Path, content: str) -> None:
    save(tmp_path, random_rows())
    (tmp_path / "small/table.json").write_text(content)
    with pytest.raises(DataError, match=r"table\.json (is malformed|has schema version None)"):
        load_table(tmp_path / "small")


def test_one_changed_byte(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    path = tmp_path / "small/table.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"table\.safetensors was changed after it was written"):
        load_table(tmp_path / "small")
    assert load_table(tmp_path / "small", verify=False).rows.shape == (300, 8)


def test_cut_short(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    os.truncate(tmp_path / "small/table.safetensors", 500)
    with pytest.raises(DataError, match=r"table\.safetensors cannot be read"):
        load_table(tmp_path / "small", verify=False)


def test_shape_that_disagrees_with_the_header(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    save_file(
        {"token_table": load_file(tmp_path / "small/table.safetensors")["token_table"][:9]},
        tmp_path / "small/table.safetensors",
    )
    with pytest.raises(
        DataError, match=r"holds \(9, 8\) torch\.float32, but table\.json says \(300, 8\)"
    ):
        load_table(tmp_path / "small", verify=False)


def test_vocabulary_that_disagrees(tmp_path: Path) -> None:
    save(tmp_path, random_rows())
    (tmp_path / "small/vocabulary.json").write_text('["a"]')
    with pytest.raises(DataError, match=r"vocabulary\.json was changed"):
        load_table(tmp_path / "small")
    late = load_table(tmp_path / "small", verify=False)
    with pytest.raises(DataError, match=r"vocabulary\.json was changed"):
        _ = late.vocabulary
    (tmp_path / "small/vocabulary.json").unlink()
    with pytest.raises(DataError, match=r"has no vocabulary\.json"):
        load_table(tmp_path / "small")

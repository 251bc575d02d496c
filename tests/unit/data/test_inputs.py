"""What may be given to `mltfr prepare`: it gives the rows of the plain file, or says why not."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import sys
import threading
import zipfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mltfr_dist.cli import main
from mltfr_dist.config import PrepareConfig, PrepareResources
from mltfr_dist.data.prepare.run import prepare
from mltfr_dist.data.shards.manifest import Manifest, load_manifest
from mltfr_dist.data.sources import read as sources
from mltfr_dist.data.sources.find import files_in
from mltfr_dist.data.sources.identity import TextMarks
from mltfr_dist.data.sources.plain import plain_files
from mltfr_dist.errors import DataError
from mltfr_dist.files import file_sha256

ROWS = [(f"u{n % 5}", f"i{n % 7}", 1_600_000_000 + n) for n in range(40)]
ALL = PrepareConfig(user_core=1, item_core=1)
HEADER = "user_id,item_id,timestamp\n"
LINES = [f"{user},{item},{time}\n" for user, item, time in ROWS]
CSV = HEADER + "".join(LINES)


def quiet(_: str) -> None:
    """A log that nobody reads."""


def prepared(
    tmp_path: Path, *given: object, log: list[str] | None = None, **values: object
) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest, and every other file by its name; the output is removed again."""
    config = ALL.model_copy(update=values)
    lines = [] if log is None else log
    output = tmp_path / "out"
    places = [str(source) for source in given]
    manifest = prepare(places if len(places) > 1 else places[0], output, config, log=lines.append)
    files = {file.name: file.read_bytes() for file in sorted(output.iterdir())}
    for name in files:
        (output / name).unlink()
    output.rmdir()
    assert not list(tmp_path.glob(".out*"))
    return manifest, {name: files[name] for name in files if name != "manifest.json"}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("plain")
    (folder / "raw.csv").write_text(CSV)
    return prepared(folder, folder / "raw.csv")[1]


def refusal(tmp_path: Path, *given: object, **values: object) -> str:
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, *given, **values)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*")), "something is half written"
    return str(caught.value)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


# --- compression ----------------------------------------------------------------------------------

CSV_BYTES = CSV.encode()
HALVES = (CSV_BYTES[:300], CSV_BYTES[300:])
PACKED = {
    "a.csv.gz": gzip.compress(CSV_BYTES),
    "stored.csv.gz": gzip.compress(CSV_BYTES, 0),
    "two_members.csv.gz": b"".join(map(gzip.compress, HALVES)),
    "padded.csv.gz": gzip.compress(CSV_BYTES) + b"\0" * 700,
    "a.csv.bz2": bz2.compress(CSV_BYTES),
    "two.csv.bz2": b"".join(map(bz2.compress, HALVES)),
    "a.csv.xz": lzma.compress(CSV_BYTES),
    "two.csv.xz": b"".join(map(lzma.compress, HALVES)),
    "a.csv.zst": zstd(CSV_BYTES),
    "two.csv.zst": b"".join(map(zstd, HALVES)),
    "twice.csv.gz.xz": lzma.compress(gzip.compress(CSV_BYTES)),
    "UPPER.CSV.GZ": gzip.compress(CSV_BYTES),
}


@pytest.mark.parametrize("name", PACKED)
def test_compressed_files_give_the_rows_of_the_plain_one(tmp_path, expected, name):
    path = tmp_path / name
    path.write_bytes(PACKED[name])
    manifest, files = prepared(tmp_path, path)
    assert files == expected
    source = manifest.source  # of the file as it was given
    assert (source.file, source.bytes, source.sha256) == (
        name,
        path.stat().st_size,
        file_sha256(path),
    )


@pytest.mark.parametrize("name", ["a.csv.gz", "stored.csv.gz", "a.csv.bz2", "a.csv.xz", "a.zip"])
def test_a_flipped_bit_never_changes_the_content(tmp_path, name):
    content = PACKED.get(name) or archive({"a.csv": CSV})
    path = tmp_path / name
    refused = 0
    for bit in random.Random(0).sample(range(8 * len(content)), 300):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            (given,) = files_in(path, name)
            marks = [TextMarks()]
            with plain_files([given], marks, tmp_path / "copies", lambda _: None) as files:
                assert files[0].path.read_bytes() == CSV_BYTES
        except DataError:
            refused += 1
    assert refused > 200


def test_a_flipped_bit_is_refused_in_a_preparation(tmp_path):
    damaged = bytearray(PACKED["stored.csv.gz"])
    damaged[300] ^= 1
    (tmp_path / "a.csv.gz").write_bytes(damaged)
    message = refusal(tmp_path, tmp_path / "a.csv.gz")
    assert "a.csv.gz is damaged or cut off" in message
    assert "incorrect data check" in message


@pytest.mark.parametrize("name", PACKED)
def test_cut_off_and_prolonged_files_are_refused(tmp_path, name):
    content = PACKED[name].rstrip(b"\0")
    for wrong in (content[:-1], content[: len(content) // 2], content + b"garbage", b""):
        (tmp_path / name).write_bytes(wrong)
        message = refusal(tmp_path, tmp_path / name)
        assert f"{name} is damaged or cut off" in message


def test_the_ending_and_the_content_must_agree(tmp_path):
    (tmp_path / "a.csv.gz").write_text(CSV)
    assert "a.csv.gz is damaged" in refusal(tmp_path, tmp_path / "a.csv.gz")
    (tmp_path / "a.csv").write_bytes(PACKED["a.csv.zst"])
    assert "is compressed inside, as .zst files are" in refusal(tmp_path, tmp_path / "a.csv")
    (tmp_path / "a.csv.7z").write_bytes(b"7z")
    assert "Unpack it first" in refusal(tmp_path, tmp_path / "a.csv.7z")


def test_a_zst_without_a_checksum_says_so(tmp_path, expected):
    log: list[str] = []
    (tmp_path / "a.csv.zst").write_bytes(PACKED["a.csv.zst"])
    assert prepared(tmp_path, tmp_path / "a.csv.zst", log=log)[1] == expected
    assert any("carries no checksum" in line for line in log)


def test_errors_in_compressed_files_name_the_file_and_its_line(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress((CSV + "u1,i1\n").encode()))
    assert f"{path}, line 42" in refusal(tmp_path, path)


def test_titles_may_be_compressed_and_are_verified(tmp_path):
    (tmp_path / "a.csv").write_text(CSV)
    titles = "item_id,title\n" + "".join(f"i{n},Title {n}\n" for n in range(7))
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(titles.encode()))
    manifest, _ = prepared(tmp_path, tmp_path / "a.csv", titles=path)
    assert manifest.report.items_with_title == 7
    assert (manifest.source.titles_file, manifest.source.titles_sha256) == (
        "t.csv.gz",
        file_sha256(path),
    )
    path.write_bytes(path.read_bytes()[:-4])
    assert "t.csv.gz is damaged" in refusal(tmp_path, tmp_path / "a.csv", titles=path)


def test_parquet_may_be_compressed_outside(tmp_path, expected):
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(parquet(ROWS)))
    assert prepared(tmp_path, tmp_path / "a.parquet.gz")[1] == expected


def parquet(rows: list[tuple], **constant: object) -> bytes:
    columns = dict(zip(("user_id", "item_id", "timestamp"), zip(*rows))) if rows else {}
    table = pa.table({name: list(values) for name, values in columns.items()})
    if not rows:
        schema = [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())]
        table = pa.schema(schema).empty_table()
    for name, value in constant.items():
        table = table.append_column(name, pa.array([value] * table.num_rows))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def test_no_room_for_a_copy_is_said_before_it_is_made(tmp_path):
    path = tmp_path / "a.csv.gz"
    claimed = gzip.compress(bytes(1 << 20))
    path.write_bytes(claimed[:-4] + (3 << 30).to_bytes(4, "little"))  # a size that is not true
    assert "damaged" in refusal(tmp_path, path)
    usage = os.statvfs(tmp_path)
    free = usage.f_bavail * usage.f_frsize
    info = zipfile.ZipInfo("a.csv")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        opened.writestr(info, CSV)
    content = (tmp_path / "a.zip").read_bytes()
    size = len(CSV).to_bytes(4, "little")
    at = content.rindex(size, 0, content.index(b"PK\x05\x06"))  # in the table at the end
    if free < (1 << 32) - 1:
        (tmp_path / "a.zip").write_bytes(content[:at] + b"\xfe\xff\xff\xff" + content[at + 4 :])
        assert "GB left" in refusal(tmp_path, tmp_path / "a.zip")


# --- archives -------------------------------------------------------------------------------------


def archive(members: dict[str, str | bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return sink.getvalue()


@pytest.mark.parametrize(
    "members",
    [
        {"a.csv": CSV},
        {"set/a.csv": HEADER + "".join(LINES[:9]), "set/b.csv": HEADER + "".join(LINES[9:])},
        {"__MACOSX/._a.csv": "x", ".DS_Store": "y", "deep/er/a.csv.gz": gzip.compress(CSV_BYTES)},
        {"../../evil.csv": CSV},
        {"/absolute/evil.csv": CSV},
    ],
)
def test_members_of_a_zip_file_are_read_without_their_paths(tmp_path, expected, members):
    (tmp_path / "a.zip").write_bytes(archive(members))
    assert prepared(tmp_path, tmp_path / "a.zip")[1] == expected
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
    assert not (tmp_path.parent / "evil.csv").exists()


def test_a_member_can_be_named(tmp_path, expected):
    path = tmp_path / "ml-1m.zip"
    path.write_bytes(
        archive({"ml-1m/README": "hello", "ml-1m/ratings.csv": CSV, "ml-1m/users.dat": "u"})
    )
    message = refusal(tmp_path, path)
    assert "several endings; it holds ml-1m/README, ml-1m/ratings.csv" in message
    assert prepared(tmp_path, path / "ml-1m/ratings.csv")[1] == expected
    assert prepared(tmp_path, path / "*.csv")[1] == expected
    assert "holds no none.csv; it holds ml-1m/README" in refusal(tmp_path, path / "none.csv")
    message = refusal(tmp_path, path / "ml-1m/users.dat", format="csv")
    assert f"{path}: ml-1m/users.dat has no column" in message


def test_what_is_no_zip_file_or_encrypted_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(archive({"a.csv": CSV})[:-10])
    assert "a.zip is damaged, or no zip file" in refusal(tmp_path, path)
    path.write_bytes(archive({}))
    assert "holds no data files; it holds nothing" in refusal(tmp_path, path)
    content = bytearray(archive({"a.csv": CSV}))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert "is encrypted" in refusal(tmp_path, path)


# --- several files, folders, patterns -------------------------------------------------------------


def given_files(folder: Path) -> list[Path]:
    """Three files that hold the rows, the last one of them without any."""
    paths = [folder / f"part-0000{n}.csv" for n in range(4)]
    folder.mkdir(parents=True, exist_ok=True)
    paths[0].write_text(HEADER + "".join(LINES[:15]))
    paths[1].write_text(HEADER)
    paths[2].write_text(HEADER + "".join(LINES[15:]))
    paths[3].write_text("")
    return paths


def test_several_files_a_folder_and_patterns_are_one_source(tmp_path, expected):
    paths = given_files(tmp_path / "data" / "deep")
    for mark in ("_SUCCESS", ".part-00000.csv.crc", "_metadata", ".hidden.csv", "part-0.csv.crc"):
        (paths[0].parent / mark).write_text("mark")
    (tmp_path / "data" / "_temporary_notes").mkdir()
    (tmp_path / "data" / "_temporary_notes" / "x.csv").write_text("mark")
    log: list[str] = []
    manifest, files = prepared(tmp_path, *paths)
    assert files == expected
    assert manifest.source.file == "part-00000.csv ... part-00003.csv (4)"
    assert manifest.source.bytes == sum(path.stat().st_size for path in paths)
    manifest, files = prepared(tmp_path, tmp_path / "data", log=log)
    assert (files, manifest.source.file) == (expected, "data")
    assert "6 left out" in log[0]
    for pattern in ("data/**/*.csv", "data/**", "data/*/*.csv", "data/d*", "data/deep/*"):
        manifest, files = prepared(tmp_path, tmp_path / pattern)
        assert files == expected
        assert manifest.report.rows_read == 40
    hidden = tmp_path / "data/deep/.hid*.csv"
    assert "no column `user_id`" in refusal(tmp_path, hidden)  # asked for by name: read


def test_all_files_without_rows_and_folders_without_files_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    assert "holds no data files" in refusal(tmp_path, tmp_path / "data")
    for name in "ab":
        (tmp_path / "data" / f"{name}.csv").write_text(HEADER)
    assert "a.csv holds no rows" in refusal(tmp_path, tmp_path / "data")
    assert "There is no file" in refusal(tmp_path, tmp_path / "none.csv")
    assert "Nothing matches" in refusal(tmp_path, tmp_path / "none*.csv")
    (tmp_path / "data" / "c.tsv").write_text(HEADER)
    assert "several formats: csv, tsv" in refusal(tmp_path, tmp_path / "data")


def test_spark_and_hive_folders_of_parquet(tmp_path, expected):
    folder = tmp_path / "events"
    for number, rows in enumerate((ROWS[:11], [], ROWS[11:])):
        place = folder / f"date=2023-08-2{number}"
        place.mkdir(parents=True)
        (place / f"part-0000{number}.snappy.parquet").write_bytes(parquet(rows))
    (folder / "_SUCCESS").write_text("")
    (folder / "_common_metadata").write_bytes(b"PAR1")
    log: list[str] = []
    assert prepared(tmp_path, folder, log=log)[1] == expected
    assert any("--partitions makes them columns" in line for line in log)


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_folders_name_never_replaces_a_column(tmp_path, expected, ending):
    folder = tmp_path / "user_id=7" / "timestamp=2020-01-01"
    folder.mkdir(parents=True)
    path = folder / f"x.{ending}"
    json = "".join(
        f'{{"user_id": "{u}", "item_id": "{i}", "timestamp": {t}}}\n' for u, i, t in ROWS
    )
    path.write_bytes({"parquet": parquet(ROWS), "csv": CSV_BYTES, "jsonl": json.encode()}[ending])
    for source in (path, tmp_path / "user_id=7", tmp_path / "*" / "*" / f"*.{ending}"):
        assert prepared(tmp_path, source)[1] == expected
    message = refusal(tmp_path, path, partitions=True)
    assert "has a column `user_id`, and so has the name of its folder" in message


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_partitions_make_columns_of_folder_names(tmp_path, ending):
    users = {"ann%3D1": ROWS[:20], "b c": ROWS[20:]}
    folder = tmp_path / "data"
    for user, rows in users.items():
        place = folder / f"user={user}"
        place.mkdir(parents=True)
        plain = [(item, time) for _, item, time in rows]
        table = pa.table({"item_id": [r[0] for r in plain], "timestamp": [r[1] for r in plain]})
        if ending == "parquet":
            pq.write_table(table, place / "x.parquet")
        elif ending == "csv":
            (place / "x.csv").write_text(
                "item_id,timestamp\n" + "".join(f"{item},{time}\n" for item, time in plain)
            )
        else:
            (place / "x.jsonl").write_text(
                "".join(f'{{"item_id": "{item}", "timestamp": {time}}}\n' for item, time in plain)
            )
    options = {"partitions": True, "user_column": "user"}
    manifest, files = prepared(tmp_path, folder, **options)
    result = pq.read_table(io.BytesIO(files["users.parquet"])).to_pydict()
    assert sorted(zip(result["user_id"], result["length"])) == [("ann=1", 20), ("b c", 20)]
    # What a folder is called is data: it shows in the source's hash.
    (folder / "user=b c").rename(folder / "user=bob")
    assert prepared(tmp_path, folder, **options)[0].source.sha256 != manifest.source.sha256
    assert "no column `user`" in refusal(tmp_path, folder, user_column="user")
    (folder / "user=bob").rename(folder / "user=__HIVE_DEFAULT_PARTITION__")
    assert "`user` is empty" in refusal(tmp_path, folder, **options)


def test_unequal_and_missing_partitions_are_refused(tmp_path):
    folder = tmp_path / "data"
    for place in ("a=1", "b=1", "a=1/a=2"):
        (folder / place).mkdir(parents=True)
        (folder / place / "x.csv").write_text(CSV)
    one, other, twice = (folder / place / "x.csv" for place in ("a=1", "b=1", "a=1/a=2"))
    message = refusal(tmp_path, one, other, partitions=True)
    assert f"{other} lies in folders of the keys b, but {one} in folders of a" in message
    assert "two folders of the key `a`" in refusal(tmp_path, twice, partitions=True)
    (tmp_path / "x.csv").write_text(CSV)
    assert "named `key=value`" in refusal(tmp_path, tmp_path / "x.csv", partitions=True)


def test_a_file_given_twice_is_refused(tmp_path):
    paths = given_files(tmp_path / "data")
    assert "part-00000.csv is given twice" in refusal(tmp_path, paths[0], paths[0])
    assert "is given twice" in refusal(tmp_path, tmp_path / "data", tmp_path / "data" / "*2.csv")
    (tmp_path / "link.csv").symlink_to(paths[0])
    assert "link.csv is given twice, also as" in refusal(tmp_path, paths[0], tmp_path / "link.csv")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    assert "read already" in refusal(tmp_path, tmp_path / "data")


def test_folders_that_would_be_read_wrongly_are_refused(tmp_path):
    paths = given_files(tmp_path / "data" / "date=1")
    for mark, words in {
        "_delta_log": "a table of Delta Lake",
        ".hoodie": "a table of Hudi",
        "_temporary": "has not finished",
    }.items():
        (tmp_path / "data" / mark).mkdir()
        assert words in refusal(tmp_path, tmp_path / "data")
        assert words in refusal(tmp_path, paths[0].parent)
        assert words in refusal(tmp_path, tmp_path / "data" / "*" / "*.csv")
        (tmp_path / "data" / mark).rmdir()
    (tmp_path / "data" / "metadata").mkdir()
    (tmp_path / "data" / "metadata" / "v1.metadata.json").write_text("{}")
    assert "a table of Iceberg" in refusal(tmp_path, tmp_path / "data")
    assert "lies in the source" in refusal(tmp_path, tmp_path)


def test_sources_and_the_output_may_stand_before_and_behind_options(tmp_path, capsys):
    first, *_, third, _ = map(str, given_files(tmp_path / "data"))
    core = ["--user-core", "1"]
    for number, words in enumerate(
        ([first, third, "OUT", *core], [*core, first, third, "OUT"], [first, third, *core, "OUT"])
    ):
        output = str(tmp_path / f"out{number}")
        assert main(["prepare", *(output if word == "OUT" else word for word in words)]) == 0
        assert load_manifest(Path(output)).report.rows_read == 40
    with pytest.raises(SystemExit):
        main(["prepare", first, "--none", str(tmp_path / "out")])
    assert "unrecognized arguments: --none" in capsys.readouterr().err
    assert main(["prepare", first, "-"]) == 2
    assert "cannot be standard output" in capsys.readouterr().err
    assert main(["prepare", "", str(tmp_path / "out")]) == 2
    assert "The name of a source is empty" in capsys.readouterr().err


def test_a_file_that_is_changed_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text(CSV)
    real = sources.load_interactions

    def growing(*arguments: object) -> int:
        with path.open("a") as file:
            file.write("u1,i1,1600000999\n")
        return real(*arguments)

    monkeypatch.setattr(sources, "load_interactions", growing)
    assert "a.csv was changed while it was read" in refusal(tmp_path, path)


def test_an_interrupted_preparation_goes_on_and_leaves_no_copies(tmp_path, expected, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "a.csv.gz"
    path.write_bytes(PACKED["a.csv.gz"])
    for step in ("sources.load_titles", "k_core"):  # while reading, and behind it
        with monkeypatch.context() as patch:
            patch.setattr(f"mltfr_dist.data.prepare.pipeline.{step}", interrupted)
            with pytest.raises(KeyboardInterrupt):
                prepare(str(path), tmp_path / "out", ALL, log=quiet)
        assert not list(tmp_path.rglob("*.unpacked"))
    log: list[str] = []
    assert prepared(tmp_path, path, log=log)[1] == expected
    assert any("read: done before the interruption" in line for line in log)


# --- streams --------------------------------------------------------------------------------------


def feed(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.csv.zst", "a.parquet"])
def test_standard_input_is_read_once_and_its_hash_is_of_what_came(
    tmp_path, expected, monkeypatch, name
):
    content = {"a.csv": CSV_BYTES, "a.parquet": parquet(ROWS)}.get(name) or PACKED[name]
    (tmp_path / "raw").write_bytes(content)
    feed(monkeypatch, content)
    format = "auto" if name == "a.parquet" else "csv"
    manifest, files = prepared(tmp_path, "-", format=format)
    assert files == expected
    assert manifest.source.file == "standard input"
    assert manifest.source.sha256 == file_sha256(tmp_path / "raw")


def test_standard_input_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    feed(monkeypatch, CSV_BYTES)
    assert "--format csv" in refusal(tmp_path, "-")
    feed(monkeypatch, b"")
    assert "standard input is empty" in refusal(tmp_path, "-", format="csv")
    feed(monkeypatch, archive({"a.csv": CSV}))
    assert "cannot be piped" in refusal(tmp_path, "-", format="csv")
    feed(monkeypatch, PACKED["a.csv.gz"][:-9])
    assert "standard input is damaged or cut off" in refusal(tmp_path, "-", format="csv")
    feed(monkeypatch, CSV_BYTES + b"u1\n")
    assert "standard input, line 42" in refusal(tmp_path, "-", format="csv")
    assert "- is given twice" in refusal(tmp_path, "-", "-", format="csv")
    monkeypatch.setattr(sys, "stdin", None)
    assert "is closed" in refusal(tmp_path, "-", format="csv")


def test_standard_input_beside_a_file_keeps_the_order(tmp_path, expected, monkeypatch):
    feed(monkeypatch, (HEADER + "".join(LINES[:5])).encode())
    (tmp_path / "b.csv").write_text(HEADER + "".join(LINES[5:]))
    assert prepared(tmp_path, "-", tmp_path / "b.csv", format="csv")[1] == expected


def test_a_fifo_is_read_once(tmp_path, expected):
    fifo = tmp_path / "events.csv"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_text, args=(CSV,))
    writer.start()
    manifest, files = prepared(tmp_path, fifo)
    writer.join()
    assert files == expected
    assert manifest.source.file == "events.csv"


# --- text -----------------------------------------------------------------------------------------

ENDS = {
    "mixed, LF first": CSV.replace("\n", "\r\n").replace("\r\n", "\n", 3),
    "mixed, CRLF first": CSV.replace("\n", "\r\n", 3),
    "CR alone": CSV.replace("\n", "\r"),
    "all three": CSV.replace("\n", "\r\n", 3).replace("\n", "\r", 9).replace("\r\r", "\r\n"),
    "doubled by Windows": CSV.replace("\n", "\r\r\n"),
    "CRLF": CSV.replace("\n", "\r\n"),
    "no end of the last line": CSV.replace("\n", "\r\n", 3)[:-1],
    "a mark of UTF-8": "\ufeff" + CSV,
    "blank first line": "\n" + CSV,
    "blank first lines": "\r\n \t\r\n" + CSV.replace("\n", "\r\n"),
    "a mark and a blank line": "\ufeff\n" + CSV,
}


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_any_line_ends_give_the_same_rows_and_lines_keep_their_numbers(
    tmp_path, expected, kind, name
):
    content = ENDS[kind].encode()
    path = tmp_path / name
    pack = gzip.compress if name.endswith("gz") else bytes
    path.write_bytes(pack(content))
    manifest, files = prepared(tmp_path, path)
    assert files == expected
    assert manifest.source.sha256 == file_sha256(path)
    if kind != "no end of the last line":
        path.write_bytes(pack(content + b"u1,i1,never\n"))
        line = len(ENDS[kind].replace("\r\n", "\n").replace("\r", "\n").split("\n"))
        assert f"{name}, line {line}: " in refusal(tmp_path, path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_converted_where_it_says_so(tmp_path, expected, encoding):
    path = tmp_path / "a.csv"
    path.write_bytes(
        ("" if encoding == "utf-16" else "\ufeff").encode(encoding) + CSV.encode(encoding)
    )
    log: list[str] = []
    assert prepared(tmp_path, path, log=log)[1] == expected
    assert any("UTF-16" in line for line in log)
    path.write_bytes(path.read_bytes()[:-1])
    assert "a.csv cannot be read to its end" in refusal(tmp_path, path)
    if encoding != "utf-16":
        path.write_bytes(CSV.encode(encoding))
        assert f"iconv -f {encoding.upper().replace('-LE', 'LE').replace('-BE', 'BE')}" in refusal(
            tmp_path, path
        )


def test_line_ends_across_the_blocks_of_reading(tmp_path, monkeypatch, expected):
    for size in (1, 3):
        for module in ("plain.BLOCK_BYTES", "identity._BLOCK_BYTES", "unpack.BLOCK_BYTES"):
            monkeypatch.setattr(f"mltfr_dist.data.sources.{module}", size)
        path = tmp_path / "a.csv"
        path.write_bytes(CSV.replace("\n", "\r\n", 20).encode())
        log: list[str] = []
        assert prepared(tmp_path, path, log=log)[1] == expected
        assert any("line ends CRLF and LF" in line for line in log)
        path.write_bytes(CSV.replace("\n", "\r\n").encode())
        assert prepared(tmp_path, path, log=(log := []))[1] == expected
        assert not any("line ends" in line for line in log)


def test_sequence_text_with_returns_within_lines_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"u1 a b c d\ru2 a b c d\nu3 a b c d\n")
    assert "1 carriage returns within lines" in refusal(tmp_path, path)
    path.write_bytes(b"u1 a b c d\ru2 a b c d\r")
    assert prepared(tmp_path, path)[0].num_users == 2
    path.write_bytes(b"u1 a b c d\r\nu2 a b c d\nu3 a b c d\r\n")
    assert prepared(tmp_path, path)[0].num_users == 3


# --- other places ---------------------------------------------------------------------------------


def test_copies_of_urls_are_of_what_is_there_now(tmp_path, expected):
    store, root = fsspec.core.url_to_fs(f"memory://{tmp_path.name}")
    store.makedirs(f"{root}/data/deep")
    store.pipe_file(f"{root}/data/deep/a.csv.gz", PACKED["a.csv.gz"])
    store.pipe_file(f"{root}/data/_SUCCESS", b"")
    base = f"memory://{tmp_path.name}"
    for place in ("data", "data/", "data/deep/a.csv.gz", "data/**/*.csv.gz"):
        assert prepared(tmp_path, f"{base}/{place}")[1] == expected
    # Another file of the same name and size in the same temporary folder is fetched, not believed.
    resources = PrepareResources(temp_dir=tmp_path / "temporary")
    store.pipe_file(f"{root}/one/a.csv", CSV_BYTES)
    store.pipe_file(f"{root}/two/a.csv", CSV_BYTES.replace(b"u1", b"v1"))
    for folder, user in (("one", "u1"), ("two", "v1")):
        output = tmp_path / folder / "out"
        prepare(f"{base}/{folder}/a.csv", output, ALL, resources=resources, log=quiet)
        assert user in pq.read_table(output / "users.parquet").to_pydict()["user_id"]
    store.pipe_file(f"{root}/table/_delta_log/0.json", b"")
    store.pipe_file(f"{root}/table/a.csv", CSV_BYTES)
    assert "a table of Delta Lake" in refusal(tmp_path, f"{base}/table")

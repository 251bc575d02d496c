"""`mltfr prepare`: raw interactions -> shards, id maps and manifest, out of core in DuckDB, restartable.

See steps.py for the tables and the order of ids, workspace.py for what survives an interruption.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import shutil
import zlib
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb

from mltfr_dist.config import PrepareConfig, PrepareResources
from mltfr_dist.data import remote, sources, splits
from mltfr_dist.data.inputs import InputFile
from mltfr_dist.data.leaks import check_train_shards
from mltfr_dist.data.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    CoreRound,
    Manifest,
    PrepareReport,
    SourceInfo,
    load_manifest,
    parse_manifest,
    verify_folder,
)
from mltfr_dist.data.readers import one
from mltfr_dist.data.steps import (
    Log,
    StepLog,
    count_cold,
    count_rows,
    drop_duplicates,
    k_core,
    make_id_maps,
    order_by_time,
)
from mltfr_dist.data.workspace import Workspace
from mltfr_dist.data.write import write_maps, write_splits
from mltfr_dist.errors import DataError
from mltfr_dist.files import file_sha256


def prepare(
    source: str,
    output: Path | str,
    config: PrepareConfig,
    *,
    resources: PrepareResources = PrepareResources(),  # noqa: B008, immutable
    packages_dir: Path | None = None,
    log: Log = print,
) -> Manifest:
    """Prepare ``source`` into the folder ``output``: complete, or not there at all.

    Equal input and configuration give equal bytes in every file, whatever the resources. Interrupted (by a crash, not by bad
    input), the same call goes on behind the last finished step or shard.

    Args:
        source: path or glob of data files, a URL of them, or a named set (see ``sources.NAMED_SETS``).
        output: folder to write, or its URL; one that holds the same data already is verified and reused.
        config: what to keep and how to split.
        resources: memory, threads and the folder for temporary files.
        packages_dir: where named sets' packages were unpacked; None: where this Python finds them.
        log: takes each line of the report.

    Returns:
        the manifest, as written.

    Raises:
        DataError: the source or the output folder cannot be used, or nothing is left to train on.
    """
    if remote.is_url(str(output)):
        return _prepare_remotely(source, str(output), config, resources, packages_dir, log)
    output = Path(output)
    workspace = Workspace(output, resources, log)
    paths, config = _resolve(source, config, packages_dir, workspace)
    info, recorded = _source_info(source, paths, config), _recorded(config)
    if _is_reusable(output, info, recorded):
        manifest = verify_folder(output)
        workspace.remove()
        log(
            f"{output} already holds this data, from the same source and configuration: verified and reused."
        )
        return manifest
    plan = info.model_dump(mode="json") | recorded.model_dump(mode="json")
    workspace.claim(plan | {"schema_version": SCHEMA_VERSION, "temp_dir": str(resources.temp_dir)})
    bad_input: DataError | None = None
    with workspace.database() as connection:
        try:
            manifest = _run(connection, paths, workspace, config, recorded, info)
        except DataError as error:
            bad_input = error
    if bad_input is not None:
        workspace.remove()  # bad input stays bad: nothing to go on with
        raise bad_input
    (workspace.out / MANIFEST_NAME).write_text(
        manifest.model_dump_json(indent=2) + "\n", encoding="utf-8"
    )
    workspace.out.rename(output)  # onto an empty folder or none
    workspace.remove()
    log(f"Written to {output}.")
    return manifest


def _prepare_remotely(
    source: str,
    url: str,
    config: PrepareConfig,
    resources: PrepareResources,
    packages_dir: Path | None,
    log: Log,
) -> Manifest:
    """Prepare on this machine, then copy to ``url``, the manifest last."""
    name = f"prepared-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    local = (resources.temp_dir or Path.cwd()) / name
    content = remote.manifest_at(url)
    if content is not None:
        manifest = parse_manifest(content, url)
        workspace = Workspace(local, resources, log)
        paths, config = _resolve(source, config, packages_dir, workspace)
        _refuse_other(manifest, url, _source_info(source, paths, config), _recorded(config))
        workspace.remove()
        log(f"{url} already holds this data, from the same source and configuration.")
        return manifest
    manifest = prepare(
        source, local, config, resources=resources, packages_dir=packages_dir, log=log
    )
    remote.upload(local, url)
    shutil.rmtree(local)
    log(f"Copied to {url}.")
    return manifest


def _resolve(
    source: str, config: PrepareConfig, packages_dir: Path | None, workspace: Workspace
) -> tuple[list[Path], PrepareConfig]:
    """The files to read, and the configuration with a named set's columns and titles filled in."""
    if source in sources.NAMED_SETS:
        found = sources.named_source(source, packages_dir)
        # A named set knows its files: a format or column set for another file would only break it.
        titles = {"titles": found.titles} if config.titles is None else {}
        columns = {
            key: value
            for key, value in found.columns.items()
            if config.titles is None or not key.startswith("titles_")
        }
        return [found.interactions], config.model_copy(
            update={"format": "tsv", **columns, **titles}
        )
    if remote.is_url(source):
        paths = remote.fetch(source, workspace.fetched)
    elif Path(source).exists() or not glob.has_magic(source):
        paths = [Path(source)]
    else:
        paths = [Path(path) for path in sorted(glob.glob(source))]  # noqa: PTH207, the pattern may be absolute
        if not paths:
            raise DataError(
                f"Nothing matches {source}.",
                remedy="Correct the pattern, or quote it if the shell cut it.",
            )
    formats = {sources.detect_format(_named(path), config.format) for path in paths}
    if len(formats) > 1:
        raise DataError(
            f"{source} matches files of several formats: {', '.join(sorted(formats))}.",
            rule="All files of a source have one format.",
            remedy="Give a pattern that matches only the interactions.",
        )
    config = config.model_copy(update={"format": formats.pop()})
    if not sources.has_time(config) and config.split == "global_temporal":
        raise DataError(
            f"{source} is read as {config.format}, which has no time.",
            rule="global_temporal cuts all users at two points in time.",
            remedy="Use --split leave_one_out, or a file with a time column.",
        )
    if config.format == "sequences" and len(paths) > 1:
        raise DataError(
            f"{source} matches {len(paths)} files of sequence text.",
            rule="Sequence text has one line a user, and so one file.",
            remedy="Join the files.",
        )
    if config.titles is not None:
        sources.detect_format(_named(config.titles))
    return paths, config


def _named(path: Path) -> InputFile:
    """A file as it is, with its ending before compression."""
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return InputFile(path, str(path), plain.suffix.lower())


def _plain(path: Path, folder: Path) -> InputFile:
    """A file to read rows from, unpacked into ``folder`` where it is compressed."""
    file = _named(path)
    if path.suffix.lower() != ".gz":
        return file
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / hashlib.sha256(str(path).encode()).hexdigest()
    try:
        with gzip.open(path) as packed, copy.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}.", remedy="Get the file again.") from None
    return InputFile(copy, file.name, file.ending)


def _recorded(config: PrepareConfig) -> PrepareConfig:
    """The configuration as the manifest holds it: without this machine's folders."""
    return config.model_copy(update={"titles": Path(config.titles.name) if config.titles else None})


def _source_info(source: str, paths: Sequence[Path], config: PrepareConfig) -> SourceInfo:
    titles = config.titles
    hashes = [file_sha256(path) for path in paths]
    return SourceInfo(
        file=paths[0].name
        if source in sources.NAMED_SETS
        else source.rstrip("/").rpartition("/")[2],
        bytes=sum(path.stat().st_size for path in paths),
        sha256=hashes[0]
        if len(paths) == 1
        else hashlib.sha256("".join(hashes).encode()).hexdigest(),
        titles_file=titles.name if titles else None,
        titles_sha256=file_sha256(titles) if titles else None,
    )


def _is_reusable(output: Path, info: SourceInfo, recorded: PrepareConfig) -> bool:
    """Whether ``output`` holds this data; False if it is absent or empty.

    Raises:
        DataError: it holds something else, which is never overwritten.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / MANIFEST_NAME).is_file():
        raise DataError(
            f"{output} exists and holds something other than prepared data.",
            rule="Preparation writes into a new or empty folder and never overwrites.",
            remedy="Give another output folder, or empty this one.",
        )
    _refuse_other(load_manifest(output), str(output), info, recorded)
    return True


def _refuse_other(
    manifest: Manifest, place: str, info: SourceInfo, recorded: PrepareConfig
) -> None:
    before = manifest.source.model_dump() | manifest.prepare.model_dump()
    now = info.model_dump() | recorded.model_dump()
    changed = [f"{key} was {before[key]}, now {now[key]}" for key in now if before[key] != now[key]]
    if changed:
        raise DataError(
            f"{place} holds data prepared differently: {'; '.join(changed)}.",
            rule="Prepared data is never overwritten, since runs may depend on it.",
            remedy="Give another output folder, or remove this one.",
        )


def _run(
    connection: duckdb.DuckDBPyConnection,
    paths: Sequence[Path],
    workspace: Workspace,
    config: PrepareConfig,
    recorded: PrepareConfig,
    info: SourceInfo,
) -> Manifest:
    """All steps on an open database; writes everything but the manifest into the workspace."""
    steps = StepLog(workspace.log)

    def read() -> int:
        folder = workspace.temporary / "plain"
        files = [_plain(path, folder) for path in paths]
        rows = sources.load_interactions(connection, files, config, workspace.log)
        steps.done("read", rows, note=f"{config.format}, {info.bytes / 1e6:,.1f} MB")
        sources.load_titles(
            connection,
            _plain(config.titles, folder) if config.titles else None,
            config.titles_item_column,
            config.titles_title_column,
        )
        return rows

    rows = workspace.step(connection, "read", read)

    def deduplicate() -> int:
        unique = drop_duplicates(connection, config.duplicates)
        steps.done("duplicates", unique, rows - unique, config.duplicates)
        return unique

    unique = workspace.step(connection, "duplicates", deduplicate)

    def core() -> list[dict[str, Any]]:
        return [
            core_round.model_dump()
            for core_round in k_core(connection, config.user_core, config.item_core, steps)
        ]

    rounds = workspace.step(connection, "k-core", core)

    def order() -> list[int]:
        ties = order_by_time(connection)
        kept = count_rows(connection, "SELECT count(*) FROM ordered")
        steps.done("order by time", kept, note=f"{ties:,} ties keep file order")
        return [kept, ties]

    kept, ties = workspace.step(connection, "order by time", order)
    report = workspace.step(connection, "split", lambda: _split(connection, config, kept, steps))
    num_users = count_rows(connection, "SELECT count(*) FROM user_map")
    num_items = count_rows(connection, "SELECT count(*) FROM item_map")
    written = write_splits(connection, workspace, config, num_items=num_items, num_users=num_users)
    files = write_maps(connection, workspace.out)
    sizes = ", ".join(
        f"{name} {split.num_sequences:,} in {len(split.shards)} shards"
        for name, split in written.items()
    )
    steps.done("write", sum(split.num_items for split in written.values()), note=sizes)
    cut = Decimal(report["cut_times"][0]) if report["cut_times"] else None
    compared = check_train_shards(
        connection, workspace.out, written["train"].shards, num_items=num_items, cut=cut
    )
    steps.done("read back", compared, note="no leak in the training shards as written")
    return Manifest(
        num_users=num_users,
        num_items=num_items,
        num_interactions=kept,
        splits=written,
        source=info,
        prepare=recorded,
        report=PrepareReport(
            rows_read=rows,
            duplicates_dropped=rows - unique,
            core_rounds=tuple(CoreRound.model_validate(values) for values in rounds),
            ties=ties,
            **report,
        ),
        files=files,
    )


def _split(
    connection: duckdb.DuckDBPyConnection, config: PrepareConfig, kept: int, steps: StepLog
) -> dict[str, Any]:
    """Cut the histories, prove that nothing leaks, map the ids; the rest of the report."""
    cuts = splits.make_prefixes(
        connection,
        config.split,
        valid_fraction=config.valid_fraction,
        test_fraction=config.test_fraction,
    )
    splits.check_no_leak(connection, cuts)
    train_only = (
        count_rows(connection, "SELECT count(*) FROM prefixes WHERE length < 3")
        if cuts is None
        else 0
    )
    short = count_rows(connection, "SELECT count(*) FROM prefixes WHERE train_length = 1")
    note = (
        f"no leak; {train_only:,} users train only; {short:,} training parts of 1 item not stored"
    )
    steps.done(config.split, kept, note=note)
    make_id_maps(connection)
    cold = {name: count_cold(connection, name) for name in ("valid", "test")}
    titles = count_rows(connection, "SELECT count(title) FROM item_map")
    steps.done(
        "id maps",
        kept,
        note=f"{titles:,} titles; cold targets: {cold['valid']:,} valid, {cold['test']:,} test",
    )
    return {
        "train_only_users": train_only,
        "short_train_sequences": short,
        "cold_targets": cold,
        "cut_times": [splits.time_text(cuts[0]), splits.time_text(cuts[1])] if cuts else None,
        "items_with_title": titles,
        "times": _time_range(connection) if sources.has_time(config) else None,
    }


def _time_range(connection: duckdb.DuckDBPyConnection) -> list[str]:
    earliest, latest = one(connection, "SELECT min(timestamp), max(timestamp) FROM ordered")
    return [splits.time_text(Decimal(earliest)), splits.time_text(Decimal(latest))]

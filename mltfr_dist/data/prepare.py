"""`mltfr prepare`: raw interactions -> shards, id maps and manifest, out of core in DuckDB, restartable.

See steps.py for the tables and the order of ids, workspace.py for what survives an interruption.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb

from mltfr_dist import __version__
from mltfr_dist.config import PrepareConfig, PrepareResources
from mltfr_dist.data import remote, sources, splits
from mltfr_dist.data.disk import is_full
from mltfr_dist.data.gather import Source, gather
from mltfr_dist.data.inputs import given_file
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
from mltfr_dist.data.places import check_apart, check_name, holds_data
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
from mltfr_dist.data.workspace import Workspace, differences
from mltfr_dist.data.write import write_maps, write_splits
from mltfr_dist.errors import DataError
from mltfr_dist.progress import say


def prepare(
    source: str | Sequence[str],
    output: Path | str,
    config: PrepareConfig,
    *,
    resources: PrepareResources = PrepareResources(),  # noqa: B008, immutable
    packages_dir: str | Path | None = None,
    log: Log = say,
) -> Manifest:
    """Prepare ``source`` into the folder ``output``: complete, or not there at all.

    Equal input and configuration give equal bytes in every file, whatever the resources. Interrupted (by a crash, not by bad
    input), the same call goes on behind the last finished step or shard.

    Args:
        source: one or several of what :func:`gather` finds files of (paths, folders, patterns,
            URLs, `-`), or a named set (see ``sources.NAMED_SETS``).
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
    check_name(output)
    places = [source] if isinstance(source, str) else list(source)
    workspace = Workspace(output, resources, log, source=places)
    with workspace.errors():
        if not holds_data(output):
            check_apart(places, output, resources)
            workspace.check_places()
        found, config = _resolve(places, output, config, packages_dir, workspace)
        info, recorded = found.info(), _recorded(config)
        if _is_reusable(output, info, recorded):
            manifest = verify_folder(output)
            workspace.remove()
            log(
                f"{output} already holds this data, from the same source and configuration: "
                "verified and reused."
            )
            return manifest
        plan = info.model_dump(mode="json") | recorded.model_dump(mode="json")
        workspace.claim(
            plan | {"schema_version": SCHEMA_VERSION, "program": __version__}, info.bytes
        )
        manifest = _prepared(workspace, found, config, recorded, info)
        (workspace.out / MANIFEST_NAME).write_text(
            manifest.model_dump_json(indent=2) + "\n", encoding="utf-8"
        )
        workspace.publish()
        workspace.remove()
    log(f"Written to {output}.")
    return manifest


def _prepared(
    workspace: Workspace,
    found: Source,
    config: PrepareConfig,
    recorded: PrepareConfig,
    info: SourceInfo,
) -> Manifest:
    """:func:`_run` on the workspace's database; where the input is bad, nothing of it stays."""
    bad_input: DataError | None = None
    with workspace.database() as connection:
        try:
            return _run(connection, found, workspace, config, recorded, info)
        except DataError as error:
            if is_full(error):
                raise
            bad_input = error
    workspace.abandon()  # bad input stays bad: nothing to go on with
    raise bad_input


def _prepare_remotely(
    source: str | Sequence[str],
    url: str,
    config: PrepareConfig,
    resources: PrepareResources,
    packages_dir: str | Path | None,
    log: Log,
) -> Manifest:
    """Prepare on this machine, then copy to ``url``, the manifest last."""
    name = f"prepared-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    local = (resources.temp_dir or Path.cwd()) / name
    content = remote.manifest_at(url)
    if content is not None:
        manifest = parse_manifest(content, url)
        places = [source] if isinstance(source, str) else list(source)
        workspace = Workspace(local, resources, log, source=places)
        found, config = _resolve(places, local, config, packages_dir, workspace)
        _refuse_other(manifest, url, found.info(), _recorded(config))
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
    places: Sequence[str],
    output: Path,
    config: PrepareConfig,
    packages_dir: str | Path | None,
    workspace: Workspace,
) -> tuple[Source, PrepareConfig]:
    """The files to read, and the configuration with a named set's columns and titles filled in."""
    if len(places) == 1 and places[0] in sources.NAMED_SETS:
        return _named(places[0], config, packages_dir)
    try:
        return _gathered(places, output, config, workspace)
    except DataError:
        shutil.rmtree(workspace.fetched, ignore_errors=True)
        with suppress(OSError):  # it holds more
            workspace.temporary.rmdir()
        raise


def _gathered(
    places: Sequence[str], output: Path, config: PrepareConfig, workspace: Workspace
) -> tuple[Source, PrepareConfig]:
    """The files of ``places``, all of one format, and the configuration with that format."""
    found = gather(
        places,
        config.titles,
        format=config.format,
        partitions=config.partitions,
        output=output,
        copies=workspace.fetched,
        log=workspace.log,
    )
    formats = {sources.detect_format(file.as_input(), config.format) for file in found.files}
    if len(formats) > 1:
        raise DataError(
            f"{found.label} matches files of several formats: {', '.join(sorted(formats))}.",
            rule="All files of a source have one format.",
            remedy="Give a pattern that matches only the interactions.",
        )
    config = config.model_copy(update={"format": formats.pop()})
    if not sources.has_time(config) and config.split == "global_temporal":
        raise DataError(
            f"{found.label} is read as {config.format}, which has no time.",
            rule="global_temporal cuts all users at two points in time.",
            remedy="Use `--split leave_one_out`, or a file with a time column.",
        )
    if config.format == "sequences" and len(found.files) > 1:
        raise DataError(
            f"{found.label} matches {len(found.files)} files of sequence text.",
            rule="Sequence text has one line a user, and so one file.",
            remedy="Join the files.",
        )
    if found.titles is not None:
        sources.detect_format(found.titles.as_input())
    return found, config


def _named(
    name: str, config: PrepareConfig, packages_dir: str | Path | None
) -> tuple[Source, PrepareConfig]:
    """A named set knows its files: a format or column set for another file would only break it."""
    found = sources.named_source(name, packages_dir)
    titles = found.titles if config.titles is None else config.titles
    columns = {
        key: value
        for key, value in found.columns.items()
        if config.titles is None or not key.startswith("titles_")
    }
    source = Source(
        found.interactions.name,
        (given_file(found.interactions, str(found.interactions)),),
        given_file(titles, str(titles)) if titles else None,
    )
    return source, config.model_copy(update={"format": "tsv", "titles": titles, **columns})


def _recorded(config: PrepareConfig) -> PrepareConfig:
    """The configuration as the manifest holds it: without this machine's folders."""
    return config.model_copy(update={"titles": Path(config.titles.name) if config.titles else None})


def _is_reusable(output: Path, info: SourceInfo, recorded: PrepareConfig) -> bool:
    """Whether ``output`` holds this data; False if there is none.

    Raises:
        DataError: it holds something else, which is never overwritten.
    """
    if not holds_data(output):
        return False
    _refuse_other(load_manifest(output), str(output), info, recorded)
    return True


def _refuse_other(
    manifest: Manifest, place: str, info: SourceInfo, recorded: PrepareConfig
) -> None:
    changed = differences(
        manifest.source.model_dump() | manifest.prepare.model_dump(),
        info.model_dump() | recorded.model_dump(),
    )
    if changed:
        raise DataError(
            f"{place} holds data prepared differently: {changed}.",
            rule="Prepared data is never overwritten, since runs may depend on it.",
            remedy="Give another output folder, or remove this one.",
        )


def _run(
    connection: duckdb.DuckDBPyConnection,
    source: Source,
    workspace: Workspace,
    config: PrepareConfig,
    recorded: PrepareConfig,
    info: SourceInfo,
) -> Manifest:
    """All steps on an open database; writes everything but the manifest into the workspace."""
    steps = StepLog(workspace.log)

    def read() -> int:
        with source.plain(workspace.copies, config.format, workspace.log) as (files, titles):
            rows = sources.load_interactions(connection, files, config, workspace.log)
            steps.done("read", rows, note=f"{config.format}, {info.bytes / 1e6:,.1f} MB")
            sources.load_titles(
                connection, titles, config.titles_item_column, config.titles_title_column
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
    manifest = Manifest(
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
    return manifest.sealed()


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

"""`mltfr prepare`: raw interactions -> shards, id maps and manifest, out of core in DuckDB,
restartable.

See steps.py for the tables and the order of ids, workspace.py for what survives an interruption.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from threading import Thread

from mltfr_dist import __version__
from mltfr_dist.config import PrepareConfig, PrepareResources
from mltfr_dist.data.prepare.disk import is_full
from mltfr_dist.data.prepare.output import check_apart, check_name, holds_data
from mltfr_dist.data.prepare.pipeline import run_steps
from mltfr_dist.data.prepare.resolve import resolve
from mltfr_dist.data.prepare.steps import (
    Log,
)
from mltfr_dist.data.prepare.workspace import Workspace, differences
from mltfr_dist.data.shards.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Manifest,
    SourceInfo,
    load_manifest,
    parse_manifest,
    verify_folder,
)
from mltfr_dist.data.sources import remote
from mltfr_dist.data.sources.gather import Source
from mltfr_dist.errors import ConfigError, DataError, MltfrError
from mltfr_dist.progress import say


def prepare(
    source: str | Sequence[str],
    output: Path | str,
    config: PrepareConfig,
    *,
    resources: PrepareResources = PrepareResources(),  # noqa: B008, immutable
    packages_dir: str | Path | None = None,
    frames: Mapping[str, object] = {},
    log: Log = say,
) -> Manifest:
    """Prepare ``source`` into the folder ``output``: complete, or not there at all.

    Equal input and configuration give equal bytes in every file, whatever the resources.
    Interrupted (by a crash, not by bad input), the same call goes on behind the last finished step
    or shard.

    Args:
        source: one or several of what :func:`gather` finds files of (paths, folders, patterns,
            URLs, `-`), or a named set (see ``sources.NAMED_SETS``).
        output: folder to write, or its URL; one that holds the same data already is verified and
            reused.
        config: what to keep and how to split.
        resources: memory, threads and the folder for temporary files.
        packages_dir: where named sets' packages were unpacked; None: where this Python finds them.
        frames: tables in memory, by the names that stand for them in ``source`` and
            ``config.titles``; see :mod:`mltfr_dist.data.sources.frames`.
        log: takes each line of the report.

    Returns:
        the manifest, as written.

    Raises:
        DataError: the source or the output folder cannot be used, or nothing is left to train on.
    """
    if remote.is_url(str(output)):
        return _prepare_remotely(source, str(output), config, resources, packages_dir, frames, log)
    output = Path(output)
    check_name(output)
    named = [source] if isinstance(source, str) else list(source)
    workspace = Workspace(output, resources, log, source=named)
    with workspace.errors():
        if not holds_data(output):
            check_apart([p for p in named if p not in frames], output, resources)
            workspace.check_places()
        origin, config = resolve(named, output, config, packages_dir, workspace, frames)
        info, recorded = origin.info(), _recorded(config)
        if _is_reusable(workspace, info, recorded):
            manifest = verify_folder(output)
            workspace.remove()
            log(
                f"{output} already holds this data, from the same source and configuration: "
                "verified and reused."
            )
            return manifest
        manifest = _prepared(workspace, origin, config, recorded, info)
        workspace.remove()
    log(f"Written to {output}.")
    return manifest


def _prepared(
    workspace: Workspace,
    source: Source,
    config: PrepareConfig,
    recorded: PrepareConfig,
    info: SourceInfo,
) -> Manifest:
    """:func:`run_steps` on the workspace's database, published; of bad input nothing stays."""
    plan = info.model_dump(mode="json") | recorded.model_dump(mode="json")
    workspace.claim(plan | {"schema_version": SCHEMA_VERSION, "program": __version__}, info.bytes)
    # WebDataset brings torch along, which takes a second: meanwhile the database reads.
    Thread(target=import_module, args=["mltfr_dist.data.prepare.leaks"], name="imports").start()
    bad_input: MltfrError | None = None
    with workspace.database() as connection:
        try:
            manifest = run_steps(connection, source, workspace, config, recorded, info)
        except (ConfigError, DataError) as error:
            if is_full(error):
                raise
            bad_input = error
    if bad_input is not None:
        workspace.abandon()  # bad input stays bad: nothing to go on with
        raise bad_input
    (workspace.out / MANIFEST_NAME).write_text(
        manifest.model_dump_json(indent=2) + "\n", encoding="utf-8"
    )
    workspace.publish()
    return manifest


def _prepare_remotely(
    source: str | Sequence[str],
    url: str,
    config: PrepareConfig,
    resources: PrepareResources,
    packages_dir: str | Path | None,
    frames: Mapping[str, object],
    log: Log,
) -> Manifest:
    """Prepare on this machine, then copy to ``url``, the manifest last."""
    name = f"prepared-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    local = (resources.temp_dir or Path.cwd()) / name
    content = remote.manifest_at(url)
    if content is not None:
        manifest = parse_manifest(content, url)
        named = [source] if isinstance(source, str) else list(source)
        workspace = Workspace(local, resources, log, source=named)
        origin, config = resolve(named, local, config, packages_dir, workspace, frames)
        _refuse_other(manifest, url, origin.info(), _recorded(config))
        workspace.remove()
        log(f"{url} already holds this data, from the same source and configuration.")
        return manifest
    manifest = prepare(
        source,
        local,
        config,
        resources=resources,
        packages_dir=packages_dir,
        frames=frames,
        log=log,
    )
    remote.upload(local, url)
    shutil.rmtree(local)
    log(f"Copied to {url}.")
    return manifest


def _recorded(config: PrepareConfig) -> PrepareConfig:
    """The configuration as the manifest holds it: without this machine's folders."""
    return config.model_copy(update={"titles": Path(config.titles.name) if config.titles else None})


def _is_reusable(workspace: Workspace, info: SourceInfo, recorded: PrepareConfig) -> bool:
    """Whether the output holds this data; False if there is none.

    Raises:
        DataError: it holds something else, which is never overwritten; no copies stay.
    """
    output = workspace.output
    if not holds_data(output):
        return False
    try:
        _refuse_other(load_manifest(output), str(output), info, recorded)
    except DataError:
        workspace.drop_fetched()
        raise
    return True


def _refuse_other(
    manifest: Manifest, folder: str, info: SourceInfo, recorded: PrepareConfig
) -> None:
    changed = differences(
        manifest.source.model_dump() | manifest.prepare.model_dump(),
        info.model_dump() | recorded.model_dump(),
    )
    if changed:
        raise DataError(
            f"{folder} holds data prepared differently: {changed}.",
            rule="Prepared data is never overwritten, since runs may depend on it.",
            remedy="Give another output folder, or remove this one.",
        )

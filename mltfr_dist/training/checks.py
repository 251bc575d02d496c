"""Whether token tables, filter and consensus of a run go together."""

from __future__ import annotations

from collections.abc import Sequence

from mltfr_dist.config import FilterConfig, RunConfig
from mltfr_dist.errors import ConfigError
from mltfr_dist.models.selectors import selector_class
from mltfr_dist.published.checks import check_group
from mltfr_dist.schema import or_nearest
from mltfr_dist.tables.store import TokenTable


def check_tables(config: RunConfig, tables: Sequence[TokenTable]) -> None:
    """Whether a run can work with these tables, by their names and sizes.

    Raises:
        ConfigError: A table given twice, a filter that does not fit one, or a group that cannot be
            merged.
    """
    names = [table.name for table in tables]
    for table in tables:
        if names.count(table.name) > 1:
            raise ConfigError(
                f"The token table `{table.name}` is given more than once.",
                rule="Experts are told apart by their table's name.",
                remedy="List each table once in mltfr.tables.",
            )
        check_filter(config.mltfr.filter, table)
    if tables:
        consensus_tables(config, tables)


def check_filter(config: FilterConfig, table: TokenTable) -> None:
    """Whether the filter can work on a table of this size.

    Raises:
        ConfigError: It keeps more than it searches, or attends to more than it may.
    """
    rows = len(table.rows)
    if config.strategy in ("direct", "seed_words") and rows > config.max_direct_rows:
        raise ConfigError(
            f"mltfr.filter.strategy={config.strategy} has every position attend to {rows:,} rows "
            f"of table `{table.name}`.",
            rule=f"At most mltfr.filter.max_direct_rows ({config.max_direct_rows:,}): cost grows "
            f"with positions x rows.",
            remedy="Raise it if the machine can bear it, give fewer words, or choose with "
            "strategy=user_guided.",
        )
    kept = config.num_kept(rows)
    searched = (
        rows if config.strategy == "random_tokens" else min(rows, config.shortlist_size or rows)
    )
    if config.strategy in ("user_guided", "random_tokens") and kept > searched:
        raise ConfigError(
            f"The filter keeps {kept} tokens of table `{table.name}`, of which {searched} rows are "
            f"searched.",
            rule="It cannot keep more than it searches.",
            remedy="Lower mltfr.filter.top_k or filter_ratio, or raise "
            "mltfr.filter.shortlist_size.",
        )


def consensus_tables(config: RunConfig, tables: Sequence[TokenTable]) -> list[int]:
    """Indices of the tables whose experts are merged.

    Raises:
        ConfigError: A name that is no table's, or experts of unequal shape.
    """
    names, mltfr = [table.name for table in tables], config.mltfr
    for name in mltfr.consensus.group:
        if name not in names:
            raise ConfigError(
                f"mltfr.consensus.group names `{name}`, which is no table of the "
                f"run{or_nearest(name, names)}.",
                remedy=f"Tables: {', '.join(names)}.",
            )
    indices = [names.index(name) for name in mltfr.consensus.group or names]
    selector = selector_class(mltfr.filter.strategy)
    shapes = {
        names[m]: (tables[m].rows.shape[1], selector.rows_kept(mltfr.filter, len(tables[m].rows)))
        for m in indices
    }
    if mltfr.consensus.enabled:
        check_group(config.published, shapes)
    return indices

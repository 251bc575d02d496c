"""The configuration tree: what it refuses and how it says so, how it merges, and that it survives
YAML.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mltfr_dist.cli import add_section, build_parser, section_from
from mltfr_dist.cli.help import topic_text
from mltfr_dist.config import FilterConfig, PrepareConfig, RunConfig, TableConfig
from mltfr_dist.errors import ConfigError
from mltfr_dist.presets import PRESETS, preset
from mltfr_dist.resolve import merge_values, parse_override, resolve_config
from mltfr_dist.schema import Section, changed, field_paths, nearest_key, validate
from mltfr_dist.training.run_folder import dump_config

MINIMAL = {"data": {"path": "d"}, "mltfr": {"enabled": False}}


def refused(*overrides: str, name: str | None = "demo") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        resolve_config(name, None, overrides)
    return caught.value


# --- refusals
# ------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("training.epoch=3", "training.epochs"),
        ("trainin.epochs=3", "training"),
        ("mltfr.filter.topk=3", "mltfr.filter.top_k"),
        ("mltfr.filter.ratio=0.1", "mltfr.filter.filter_ratio"),
        ("epochs=3", "training.epochs"),
        ("optimizer.lr_rate=1", "optimizer.learning_rate"),
        ("top_k=3", "mltfr.filter.top_k"),
        pytest.param(
            "seed=3",
            "training.seed",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, nearest: str) -> None:
    error = refused(override)
    # A misspelt section is refused as a whole, by its own name.
    assert f"`{override.partition('=')[0]}` is not a field" in str(
        error
    ) or "`trainin` is not a field" in str(error)
    assert f"the nearest is `{nearest}`" in str(error)


def test_an_unknown_key_without_a_likeness_names_none() -> None:
    error = refused("xyzzy=1")
    assert "`xyzzy` is not a field." in str(error)
    assert "nearest" not in str(error)


@pytest.mark.parametrize(
    ("override", "path", "value", "rule"),
    [
        ("training.epochs=many", "training.epochs", "'many'", "valid integer"),
        ("training.epochs=2.5", "training.epochs", "2.5", "fractional"),
        ("training.epochs=0", "training.epochs", "0", "greater than or equal to 1"),
        ("training.epochs=null", "training.epochs", "None", "valid integer"),
        ("training.seed=-1", "training.seed", "-1", "greater than or equal to 0"),
        ("backbone.dropout=1", "backbone.dropout", "1", "less than 1"),
        ("backbone.dropout=-0.1", "backbone.dropout", "-0.1", "greater than or equal to 0"),
        ("mltfr.filter.temperature=0", "mltfr.filter.temperature", "0", "greater than 0"),
        (
            "mltfr.filter.filter_ratio=1.5",
            "mltfr.filter.filter_ratio",
            "1.5",
            "less than or equal to 1",
        ),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate", "nan", "finite"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1", "1.0", "less than 1"),
        ("mltfr.router.name=softmx", "mltfr.router.name", "'softmx'", "the nearest is `softmax`"),
        ("loss.name=gbca", "loss.name", "'gbca'", "the nearest is `gbce`"),
        ("optimizer.name=adamm", "optimizer.name", "'adamm'", "the nearest is `adam`"),
        ("optimizer.name=lamb", "optimizer.name", "'lamb'", "optimizers are adamw, adam, sgd"),
        ("optimizer.momentum=1", "optimizer.momentum", "1", "less than 1"),
        (
            "loss.name=hinge",
            "loss.name",
            "'hinge'",
            "losses are cross_entropy, sampled_softmax, bce, gbce",
        ),
        ("backbone.name=gru4rec", "backbone.name", "'gru4rec'", "backbones are sasrec, esasrec"),
        (
            "backbone.bsarec.low_frequencies=0",
            "backbone.bsarec.low_frequencies",
            "0",
            "greater than or equal to 1",
        ),
        (
            "backbone.bsarec.inductive_bias=2",
            "backbone.bsarec.inductive_bias",
            "2",
            "less than or equal to 1",
        ),
        ("backbone.bert4rec.mask_ratio=0", "backbone.bert4rec.mask_ratio", "0", "greater than 0"),
        ("loss.calibration=1.1", "loss.calibration", "1.1", "less than or equal to 1"),
        (
            "backbone.cl4srec.contrast_group=1",
            "backbone.cl4srec.contrast_group",
            "1",
            "greater than or equal to 2",
        ),
        (
            "backbone.bsarec.low_frequencies=2",
            "backbone",
            "bsarec.low_frequencies",
            "a setting of bsarec and bsarec_original, and name is sasrec",
        ),
        ("loss.proposal=zipf", "loss.proposal", "'zipf'", "'uniform' or 'log_uniform'"),
        ("mltfr.enabled=perhaps", "mltfr.enabled", "'perhaps'", "valid boolean"),
        ("training=5", "training", "5", "TrainingConfig"),
        ("evaluation.cutoffs=[10, 0]", "evaluation.cutoffs.1", "0", "greater than or equal to 1"),
        ("name=../elsewhere", "name", "'../elsewhere'", "pattern"),
        ("name=..", "name", "'..'", "pattern"),
        ("baselines=[popular]", "baselines.0", "'popular'", "the nearest is `popularity`"),
        # Fields that are right alone but not together.
        ("backbone.num_heads=3", "backbone", "3", "num_heads (3) must divide hidden_dim (64)"),
        (
            "mltfr.filter.top_k=4096",
            "mltfr.filter",
            "4096",
            "top_k (4096) must not exceed shortlist_size (2048)",
        ),
        ("mltfr.tables=[]", "mltfr", "mltfr.tables", "at least one token table"),
        (
            "mltfr.filter.filter_ratio=0.25",
            "mltfr.filter",
            "filter_ratio",
            "exactly one of top_k and filter_ratio",
        ),
        (
            "mltfr.filter.top_k=null",
            "mltfr.filter",
            "top_k",
            "exactly one of top_k and filter_ratio",
        ),
        ("evaluation.cutoffs=[5, 20]", "evaluation", "cutoffs", "must hold 10"),
        ("mltfr.filter.filter_ratio=0", "mltfr.filter.filter_ratio", "0", "greater than 0"),
        (
            "mltfr.filter.strategy=best",
            "mltfr.filter.strategy",
            "'best'",
            "strategies are user_guided, random_tokens, direct",
        ),
        (
            "mltfr.filter.top_k=1",
            "(whole configuration)",
            "mltfr.filter.top_k",
            "at least 2: the weight of a single token carries no gradient",
        ),
        ("mltfr.filter.noise_steps=5", "mltfr.filter", "noise_steps", "give noise above 0"),
        ("mltfr.router.top_k=1", "mltfr.router.top_k", "1", "greater than or equal to 2"),
        (
            "mltfr.router.top_k=4",
            "mltfr",
            "router.top_k (4)",
            "must not exceed the number of gates",
        ),
        ("mltfr.router.expert_dropout=1", "mltfr.router.expert_dropout", "1", "less than 1"),
        ("mltfr.expert.per_table=0", "mltfr.expert.per_table", "0", "greater than or equal to 1"),
    ],
)
def test_a_message_has_path_value_rule_and_remedy(
    override: str, path: str, value: str, rule: str
) -> None:
    error = refused(override)
    message = str(error)
    assert f"`{path}`" in message
    assert value in message
    assert rule in message
    assert f"`{override}`" in message  # where it came from
    assert error.remedy in message
    assert "`mltfr train --help " in error.remedy


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("evaluation.cutoffs=[5, 20]", "(5, 20)"),
        ("mltfr.filter.filter_ratio=0.25", "given: top_k 16"),
    ],
)
def test_rules_over_several_fields_name_the_values(override: str, value: str) -> None:
    assert value in refused(override).what


def test_sparse_item_gradients_need_a_loss_that_samples() -> None:
    message = refused("optimizer.item_gradients=sparse").what
    assert "loss.name cross_entropy, which scores every item" in message
    assert "sampled_softmax, bce or gbce" in message


def test_sparse_item_gradients_need_an_optimizer_that_steps_rows() -> None:
    sparse = ("optimizer.item_gradients=sparse", "loss.name=bce")
    message = refused(*sparse, "optimizer.name=sgd").what
    assert "optimizer.name is sgd: give optimizer.name adamw or adam, or item_gradients" in message


def test_all_problems_are_named_at_once() -> None:
    message = str(refused("training.epochs=0", "training.epoch=1", "loss.name=x"))
    assert all(path in message for path in ("`training.epochs`", "`training.epoch`", "`loss.name`"))


@pytest.mark.parametrize("missing", ["data", "mltfr"])
def test_a_required_section_is_named(missing: str) -> None:
    values = {key: value for key, value in MINIMAL.items() if key != missing}
    with pytest.raises(ConfigError, match=f"`{missing}` is required and was not given"):
        validate(RunConfig, values, source="test")


@pytest.mark.parametrize(("valid", "test"), [(0.5, 0.5), (0.9, 0.2)])
def test_splits_that_leave_no_training_data(valid: float, test: float) -> None:
    with pytest.raises(ConfigError, match="must stay below 1"):
        validate(PrepareConfig, {"valid_fraction": valid, "test_fraction": test}, source="test")


@pytest.mark.parametrize(
    "override",
    [
        "training.epochs=true",
        "optimizer.learning_rate=.inf",
        "mltfr.router.balance_weight=.inf",
        f"training.seed={2**64}",
    ],
)
def test_values_that_mean_nothing_are_refused(override: str) -> None:
    refused(override)


def test_sections_are_frozen() -> None:
    config = preset("demo")
    with pytest.raises(ValueError, match="frozen"):
        config.training.epochs = 3


# --- overrides and merging
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b.c=1", {"a": {"b": {"c": 1}}}),
        ("a=1e-3", {"a": 0.001}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ("a=null", {"a": None}),
        ("a=", {"a": None}),
        ("a=x=y", {"a": "x=y"}),
        ("a=[broken", {"a": "[broken"}),
        ("a={b: 2}", {"a": {"b": 2}}),
    ],
)
def test_overrides_are_parsed_as_yaml(text: str, expected: dict) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["training.epochs", "=3", ""])
def test_an_override_without_key_or_value_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_override(text)


def test_numbers_reach_the_configuration() -> None:
    config = resolve_config(
        "demo",
        None,
        [
            "optimizer.learning_rate=1e-4",
            "training.micro_batch_size=8",
            "mltfr.filter.shortlist_size=null",
        ],
    )
    assert config.optimizer.learning_rate == 1e-4
    assert config.training.micro_batch_size == 8
    assert config.mltfr.filter.shortlist_size is None


def test_preset_file_and_overrides_lie_each_over_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: mine\ntraining: {epochs: 7, seed: 5}\n")
    config = resolve_config("demo", file, ["training.epochs=9", "training.epochs=11"])
    assert (config.name, config.training.epochs, config.training.seed) == ("mine", 11, 5)
    assert config.training.global_batch_size == preset("demo").training.global_batch_size
    assert config.data == preset("demo").data


def test_one_of_two_exclusive_fields_is_replaced_by_setting_both() -> None:
    config = resolve_config("demo", None, ["mltfr.filter={top_k: null, filter_ratio: 0.01}"])
    assert config.mltfr.filter.num_kept(3000) == 30


JSON = st.recursive(
    st.integers() | st.none(),
    lambda c: st.dictionaries(st.sampled_from("abc"), c, max_size=3),
    max_leaves=8,
)
TREE = st.dictionaries(st.sampled_from("abc"), JSON, max_size=3)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(TREE, TREE)
def test_merging_takes_the_upper_value_and_keeps_the_rest(under: dict, over: dict) -> None:
    kept_under, kept_over = yaml.safe_dump(under), yaml.safe_dump(over)
    merged = merge_values(under, over)
    assert (yaml.safe_dump(under), yaml.safe_dump(over)) == (kept_under, kept_over)
    assert set(merged) == set(under) | set(over)
    for key in merged:
        if key not in over:
            assert merged[key] == under[key]
        elif isinstance(over[key], dict) and isinstance(under.get(key), dict):
            assert merged[key] == merge_values(under[key], over[key])
        else:
            assert merged[key] == over[key]
    assert merge_values(merged, over) == merged


def test_nothing_given_is_an_error() -> None:
    with pytest.raises(ConfigError, match="No configuration is given") as caught:
        resolve_config(None, None, ["training.epochs=3"])
    assert "demo" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n", "does not hold a mapping"), ("a: [1\n", "not valid YAML"), ("", "mapping")],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve_config(None, file, [])


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        resolve_config(None, tmp_path / "none.yaml", [])


# --- round trip, presets, help
# -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_yaml(name: str) -> None:
    config = preset(name)
    assert config.name == name
    text = dump_config(config)
    again = validate(RunConfig, yaml.safe_load(text), source="yaml")
    assert again == config
    assert dump_config(again) == text
    assert PRESETS[name].__doc__


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no preset `dmeo`; the nearest is `demo`") as caught:
        preset("dmeo")
    assert all(name in caught.value.remedy for name in PRESETS)


def test_other_values_survive_yaml() -> None:
    overrides = [
        "mltfr.filter={top_k: null, filter_ratio: 0.1}",
        "optimizer.max_grad_norm=0.1",
        "evaluation.cutoffs=[1, 10]",
        "name=1a",
    ]
    config = resolve_config("smoke", None, [*overrides, "runs_dir=some where/ü"])
    assert validate(RunConfig, yaml.safe_load(dump_config(config)), source="yaml") == config
    assert config.folder == Path("some where/ü/1a")


def sections(model: type[Section]) -> list[type[Section]]:
    inner = [
        f.annotation
        for f in model.model_fields.values()
        if isinstance(f.annotation, type) and issubclass(f.annotation, Section)
    ]
    return [model, *(s for i in inner for s in sections(i))]


@pytest.mark.parametrize(
    "model", [*sections(RunConfig), PrepareConfig, TableConfig], ids=lambda m: m.__name__
)
def test_every_field_and_section_is_described(model: type[Section]) -> None:
    assert model.__doc__
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.description.endswith((".", "?")), (
            f"{model.__name__}.{name}: {field.description}"
        )


def test_help_shows_every_field_with_its_description() -> None:
    text = " " + " ".join(topic_text(RunConfig, "all").split())
    for path in field_paths(RunConfig):
        assert f" {path} (" in text or f" {path}: " in text, path
    for model in sections(RunConfig):
        assert all(field.description in text for field in model.model_fields.values())
    assert "optimizer.learning_rate (float, > 0; default: 0.001)" in text
    assert "data.path (path; default: required)" in text
    assert (
        'loss.name (cross_entropy | sampled_softmax | bce | gbce; default: "cross_entropy")' in text
    )
    assert "mltfr.filter.top_k (int or null, >= 1; default: 16)" in text


def test_train_help_holds_the_sections(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    import train

    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "mltfr.filter  " in shown, "a section has its line"
    assert "mltfr.filter.top_k" not in shown, "its fields have not"


def test_field_paths_and_nearest_key() -> None:
    paths = field_paths(RunConfig)
    assert {"training", "training.seed", "mltfr.filter.top_k", "deepspeed"} <= set(paths)
    assert len(paths) == len(set(paths))
    assert nearest_key("mltfr.filter.top_k", paths) == "mltfr.filter.top_k"
    assert nearest_key("qqqq", paths) is None
    assert nearest_key("x", []) is None


@pytest.mark.parametrize(
    ("ratio", "rows", "expected"), [(0.5, 7, 4), (0.001, 100, 2), (1.0, 9, 9), (0.01, 32_000, 320)]
)
def test_filter_ratio(ratio: float, rows: int, expected: int) -> None:
    assert FilterConfig(top_k=None, filter_ratio=ratio).num_kept(rows) == expected


# --- flat sections as options
# ------------------------------------------------------------------------------------


def test_options_make_a_section() -> None:
    options = build_parser().parse_args(
        [
            "prepare",
            "a.csv",
            "out",
            "--user-core",
            "3",
            "--split",
            "global_temporal",
            "--valid-fraction",
            "0.2",
        ]
    )
    made = section_from(PrepareConfig, options)
    assert made == PrepareConfig(user_core=3, split="global_temporal", valid_fraction=0.2)
    options = build_parser().parse_args(["tables", "a", "b", "--keep-special"])
    assert section_from(TableConfig, options).keep_special is True
    assert section_from(TableConfig, build_parser().parse_args(["tables", "a"])) == TableConfig()


def test_a_wrong_option_is_refused_with_its_name() -> None:
    options = build_parser().parse_args(["prepare", "a.csv", "out", "--user-core", "some"])
    with pytest.raises(
        ConfigError, match=r"the command line is not valid: `--user-core`: .*given: 'some'"
    ):
        section_from(PrepareConfig, options)


def test_every_section_field_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    for command, model in (("prepare", PrepareConfig), ("tables", TableConfig)):
        with pytest.raises(SystemExit):
            build_parser().parse_args([command, "--help"])
        shown = capsys.readouterr().out
        assert all("--" + name.replace("_", "-") in shown for name in model.model_fields)
    assert callable(add_section)


def test_a_changed_configuration_is_validated_and_keeps_which_options_were_given() -> None:
    given = validate(PrepareConfig, {"user_column": "user_id"}, source="test")
    made = changed(given, {"format": "tsv"}, source="test")
    assert made.model_fields_set == {"user_column", "format"}
    config = validate(RunConfig, MINIMAL, source="test")
    assert changed(config, {"training.epochs": 3}, source="test").training.epochs == 3
    with pytest.raises(ConfigError, match=r"from the sweep is not valid: `training.epochs`"):
        changed(config, {"training.epochs": -3}, source="the sweep")

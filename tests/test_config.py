"""Settings: defaults, YAML, `--set`, aliases, and the message of every mistake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from tuneloom.config import EMBEDDED_MODEL, Config, SourceConfig, dump_config, load_config, parse_config
from tuneloom.config.recipes import find_recipe
from tuneloom.errors import UserError
from tuneloom.types import Overflow, TrainOn

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write a config file and load it."""

    def write_and_load(text: str | bytes, sets: Sequence[str] = ()) -> Config:
        file = tmp_path / "config.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(file, sets)

    return write_and_load


def test_defaults_train_the_embedded_model_on_its_built_in_set() -> None:
    config = load_config()
    assert config.base_model.path == EMBEDDED_MODEL
    assert config.data.train == (SourceConfig(path="self_cognition"),)
    assert (config.data.cutoff_len, config.data.overflow, config.data.train_on) == (
        1024,
        Overflow.CUT_AT_TURN,
        TrainOn.ASSISTANT,
    )
    assert (config.adapter.r, config.adapter.lora_alpha, config.adapter.target_modules) == (8, 16, "all-linear")
    assert (config.training.learning_rate, config.training.num_train_epochs, config.training.precision) == (5e-5, 3.0, "auto")
    assert config.training.num_samples_per_step == 16
    assert config.method == "lora"


def test_an_empty_file_means_the_defaults(load: Load) -> None:
    assert load("") == load("# nothing yet\n") == load_config()


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml")))
def test_every_recipe_loads_and_survives_dump_and_load(name: str, load: Load) -> None:
    config = load_config(find_recipe(name))
    assert load(dump_config(config)) == config


def test_the_base_case_recipe_has_the_numbers_of_the_base_case() -> None:
    config = load_config(ROOT / "recipes" / "chatglm3-base-case.yaml")
    training = config.training
    assert (config.adapter.r, config.adapter.lora_alpha, config.adapter.target_modules) == (8, 16, "all-layers")
    assert (training.optim, training.learning_rate, training.num_train_epochs) == ("adamw_torch", 5e-5, 50)
    assert (training.max_grad_norm, training.precision, training.lr_scheduler_type) == (1.0, "fp16", "cosine")
    assert (config.data.max_samples, config.data.cutoff_len, config.data.validation) == (100_000, 1024, 0)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 8)


def test_dump_and_load_give_an_equal_config(load: Load) -> None:
    config = parse_config(
        {
            "base_model": {"path": "D:\\models\\模型", "revision": "v1.0", "quantization": "4bit"},
            "name": "1e5",
            "data": {
                "train": [{"path": "a.jsonl", "count": 5, "columns": {"instruction": "问题"}}, {"path": "b", "share": 0.25}],
                "validation": ["dev.json"],
                "overflow": "drop",
                "train_on": "last_assistant",
                "variables": {"name": "小织", "author": "yes", "x": "{{x}}"},
            },
            "adapter": {
                "target_modules": ["q_proj", "v_proj"],
                "use_rslora": True,
                "use_dora": True,
                "init_lora_weights": False,
            },
            "training": {"learning_rate": 3e-7, "eval_steps": "epoch", "load_best_model_at_end": True, "bf16": True},
            "evaluation": {"prompts": ["你是谁？", "a: b", "# no"]},
        }
    )
    assert load(dump_config(config)) == config
    assert config.method == "rslora+dora"


@given(values=st.dictionaries(st.from_regex(r"\w{1,8}", fullmatch=True), st.text(max_size=12), max_size=3))
def test_any_text_survives_dump_and_load(values: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "any-text.yaml"
    config = parse_config({"data": {"variables": values}, "evaluation": {"prompts": list(values.values())}})
    file.write_bytes(dump_config(config).encode())
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("held", "key"),
    [
        ("test: {path: c.jsonl, count: 3}", "count"),
        ("test: [c.jsonl, {path: d.jsonl, share: 0.5}]", "share"),
        ("test: {path: c.jsonl, replay: self}", "replay"),
        ("validation: {path: c.jsonl, weight: 2}", "weight"),
        ("validation: [{path: c.jsonl, count: 3}]", "count"),
    ],
)
def test_what_sizes_a_mixture_is_refused_where_it_would_have_no_effect(load: Load, held: str, key: str) -> None:
    with pytest.raises(UserError) as caught:
        load(f"data: {{train: a.jsonl, {held}}}\n")
    assert f"a source without {key}, which is for data.train alone" in str(caught.value)
    assert "data" in str(caught.value.where)


def test_a_string_stands_for_the_path_of_models_and_sources(load: Load) -> None:
    config = load("base_model: some/model\ndata: {train: a.jsonl, validation: b.jsonl, test: [c.jsonl]}\n")
    assert config == load(
        "base_model: {path: some/model}\n"
        "data: {train: [{path: a.jsonl}], validation: [{path: b.jsonl}], test: [{path: c.jsonl}]}\n"
    )


def test_a_share_or_none_can_be_held_out(load: Load) -> None:
    assert load("data: {validation: 0.1}").data.validation == 0.1
    assert not load("data: {validation: 0}").data.validation
    assert not load("data: {validation: 0.0}").data.validation


@pytest.mark.parametrize("text", ["5e-5", "5E-05", "0.00005", "5.0e-5"])
def test_a_float_may_be_written_without_a_dot(load: Load, text: str) -> None:
    assert load(f"training: {{learning_rate: {text}}}").training.learning_rate == 5e-5
    assert load("", [f"training.learning_rate={text}"]).training.learning_rate == 5e-5


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("fp16: true", "fp16"),
        ("bf16: true", "bf16"),
        ("{fp16: false, bf16: true}", "bf16"),
        ("{fp16: false, bf16: false}", "auto"),
        ("{precision: auto, fp16: true}", "fp16"),
        ("{precision: fp32, fp16: false}", "fp32"),
    ],
)
def test_fp16_and_bf16_are_aliases_of_precision(load: Load, text: str, precision: str) -> None:
    assert load(f"training:\n  {text}\n").training.precision == precision


def test_set_reaches_nested_keys_and_wins_over_the_file(load: Load) -> None:
    config = load(
        "training: {seed: 1, max_steps: 5}\n",
        ["training.seed=2", "training.seed=3", "data.variables.name=Loomi", "adapter.target_modules=[q_proj, v_proj]"],
    )
    assert (config.training.seed, config.training.max_steps) == (3, 5)
    assert config.data.variables == {"name": "Loomi"}
    assert config.adapter.target_modules == ("q_proj", "v_proj")


def test_set_takes_yaml_values(load: Load) -> None:
    config = load("", ["name=null", "data.train=[a, {path: b, count: 3}]", "adapter.use_dora=true", "output_dir='1'"])
    assert config.name is None
    assert config.data.train == (SourceConfig(path="a"), SourceConfig(path="b", count=3))
    assert config.adapter.use_dora
    assert config.output_dir == "1"


def test_set_deepens_a_base_model_that_was_a_string(load: Load) -> None:
    config = load("base_model: some/model\n", ["base_model.quantization=4bit"])
    assert (config.base_model.path, config.base_model.quantization) == ("some/model", "4bit")
    config = load("", ["base_model=some/model", "base_model.revision=main"])
    assert (config.base_model.path, config.base_model.revision) == ("some/model", "main")


def test_set_fills_a_section_that_the_file_leaves_empty(load: Load) -> None:
    assert load("training:\n", ["training.seed=1"]).training.seed == 1


@dataclass(frozen=True)
class Bad:
    """A config file (or `--set`s) with a mistake, and what its message says."""

    name: str
    text: str | bytes
    what: str
    where: str = ""
    mend: str = ""
    got: str = ""
    sets: tuple[str, ...] = ()


KEY = "did you mean `{}`?".format
BAD = [
    Bad("typo at the root", "bse_model: x", "unknown key `bse_model`", ":1 bse_model", KEY("base_model")),
    Bad("hyphens at the root", "\nbase-model: x", "unknown key `base-model`", ":2 base-model", KEY("base_model")),
    Bad("hyphens in a section", "training:\n  seed: 1\n  learning-rate: 1\n", "`learning-rate`", ":3 ", KEY("learning_rate")),
    Bad("a key like a type", "str: 3", "unknown key `str`", ":1 str"),
    Bad("a key that is a list", "? [a, b]\n: 3\n", "unknown key `('a', 'b')`"),
    Bad(
        "typo in a section",
        "training:\n  learning_rat: 1\n",
        "`learning_rat`",
        ":2 training.learning_rat",
        KEY("learning_rate"),
    ),
    Bad("typo of an alias", "training: {fp61: true}", "unknown key `fp61`", ":1 training.fp61", KEY("fp16")),
    Bad("typo in base_model", "base_model:\n  path: x\n  revison: y\n", "`revison`", ":3 base_model.revison", KEY("revision")),
    Bad(
        "typo in a source",
        "data:\n  train:\n    - a\n    - path: b\n      cuont: 2\n",
        "`cuont`",
        ":5 data.train[1].cuont",
        KEY("count"),
    ),
    Bad(
        "typo in a lone source",
        "data:\n  train:\n    path: b\n    wieght: 2\n",
        "`wieght`",
        ":4 data.train.wieght",
        KEY("weight"),
    ),
    Bad(
        "typo in validation",
        "data:\n  validation:\n  - path: b\n    wieght: 2\n",
        "`wieght`",
        ":4 data.validation[0].wieght",
        KEY("weight"),
    ),
    Bad("a key like nothing", "evaluation: {zzz: 1}", "unknown key `zzz`", ":1 evaluation.zzz", "docs/configuration.md"),
    Bad("a section that is a number", "training: 3", "wrong value for `training`", ":1 training", got="3"),
    Bad("a section that is a list", "data: []", "wrong value for `data`", ":1 data", got="[]"),
    Bad("text for a number", "training:\n  seed: many\n", "wrong value for `training.seed`", ":2 training.seed", got="'many'"),
    Bad("a fraction for a count", "training: {max_steps: 1.5}", "`training.max_steps`", ":1 ", got="1.5"),
    Bad("a number for a flag", "adapter: {use_dora: 7}", "wrong value for `adapter.use_dora`", ":1 ", got="7"),
    Bad(
        "a number for text", "data: {variables: {my-name: 3}}", "`data.variables.my-name`", ":1 data.variables.my-name", got="3"
    ),
    Bad("a negative rank", "adapter: {r: -8}", "wrong value for `adapter.r`", ":1 adapter.r", got="-8"),
    Bad("rank 0", "adapter: {r: 0}", "wrong value for `adapter.r`", got="0"),
    Bad("a learning rate of 0", "training: {learning_rate: 0}", "`training.learning_rate`", got="0"),
    Bad("an endless learning rate", "training: {learning_rate: .inf}", "`training.learning_rate`", got="inf"),
    Bad("epochs without end", "training: {num_train_epochs: .inf}", "`training.num_train_epochs`", got="inf"),
    Bad("a share of 1", "data: {validation: 1.0}", "wrong value for `data.validation`", ":1 data.validation", got="1.0"),
    Bad("a dropout of 1", "adapter: {lora_dropout: 1}", "wrong value for `adapter.lora_dropout`", got="1"),
    Bad("a tiny cutoff", "data: {cutoff_len: 7}", "wrong value for `data.cutoff_len`", got="7"),
    Bad("an unknown scheduler", "training: {lr_scheduler_type: cosin}", "`training.lr_scheduler_type`", got="'cosin'"),
    Bad("an unknown overflow", "data: {overflow: cut}", "wrong value for `data.overflow`", got="'cut'"),
    Bad("an unknown target word", "adapter: {target_modules: all-linera}", "`adapter.target_modules`", got="'all-linera'"),
    Bad("no targets", "adapter: {target_modules: []}", "`adapter`", ":1 adapter", got="[]"),
    Bad("no sources", "data: {train: []}", "wrong value for `data.train`", got="[]"),
    Bad("a source without a path", "data: {train: [{count: 3}]}", "`data.train[0].path`", ":1 data.train[0].path"),
    Bad("an empty path", "data: {train: ''}", "wrong value for `data.train`", got="''"),
    Bad("count and share", "data: {train: [{path: a, count: 3, share: 0.5}]}", "`data.train[0]`", ":1 data.train[0]"),
    Bad("share and weight", "data: {train: {path: a, weight: 3, share: 0.5}}", "`data.train`", ":1 data.train"),
    Bad("a slash in the name", "name: a/b", "wrong value for `name`", ":1 name", got="'a/b'"),
    Bad("half a character", 'name: "\\ud800"', "wrong value for `name`", got="'\\ud800'"),
    Bad("fp16 and bf16", "training: {fp16: true, bf16: true}", "`training`", ":1 training"),
    Bad("fp16 and another precision", "training: {fp16: true, precision: fp32}", "`training`", ":1 training"),
    Bad("fp16 that is no flag", "training: {fp16: 1}", "wrong value for `training`", ":1 training"),
    Bad("best of nothing", "training: {load_best_model_at_end: true}", "load_best_model_at_end needs data.validation"),
    Bad("a tab", "training:\n\tseed: 1\n", "not valid YAML", ":2", "indentation"),
    Bad("two colons", "\n\nname: a: b", "not valid YAML", ":3", "a missing colon"),
    Bad("an open bracket", "data:\n  train: [a\n", "not valid YAML", ":3", "bracket"),
    Bad("an open quote", "name: 'a", "not valid YAML", ":1", "quotes"),
    Bad("an unknown alias", "name: *x", "not valid YAML", ":1", got="undefined alias"),
    Bad("a key twice", "name: a\noutput_dir: b\nname: c\n", "not valid YAML", ":3", got='duplicate key "name"'),
    Bad(
        "a long key twice",
        "name: |\n  a\n  b\n  c\nname: |\n  a\n  b\n  c\n",
        "not valid YAML",
        ":5",
        got='duplicate key "name"',
    ),
    Bad("nested without end", "x: [" * 3000, "not valid YAML"),
    Bad("a list at the root", "- a\n- b\n", "not a map of keys", got="list"),
    Bad("text at the root", "hello", "not a map of keys", got="str"),
    Bad("not UTF-8", b"name: \xff", "not UTF-8", mend="UTF-8", got="byte 6"),
    Bad("too large", b"#" * 1_000_001, "too large"),
    Bad("--set without a value", "", "--set wants key=value", got="'training.seed'", sets=("training.seed",)),
    Bad("--set without a key", "", "--set wants key=value", got="'=3'", sets=("=3",)),
    Bad("--set with a typo", "training: {seed: 1}", "`sed`", "--set training.sed", KEY("seed"), sets=("training.sed=3",)),
    Bad(
        "--set with a wrong value",
        "",
        "wrong value for `training.seed`",
        "--set training.seed",
        got="'x'",
        sets=("training.seed=x",),
    ),
    Bad("--set that is not YAML", "", "not valid YAML", "--set name", got="','", sets=("name=[1",)),
    Bad(
        "--set into a number",
        "training: {seed: 1}",
        "cannot reach",
        "--set training.seed.x",
        "set seed itself",
        "seed is 1",
        ("training.seed.x=1",),
    ),
    Bad(
        "--set into a list",
        "data: {train: [a]}",
        "cannot reach",
        "--set data.train.count",
        "set train itself",
        sets=("data.train.count=1",),
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_a_mistake_is_told_with_what_where_and_mend(bad: Bad, load: Load) -> None:
    with pytest.raises(UserError) as caught:
        load(bad.text, bad.sets)
    error = caught.value
    assert bad.what in error.what
    assert bad.where in (error.where or "")
    assert bad.mend in (error.mend or "")
    assert bad.got in (error.got or "")
    assert bad.where.startswith("--set") or error.where is None or "config.yaml" in error.where
    assert len(error.message().splitlines()) <= 6


def test_missing_file_and_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config file not found") as caught:
        load_config(tmp_path / "none.yaml")
    assert caught.value.where == str(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="the config is a folder"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="did you mean `persona-lora`") as caught:
        find_recipe("persona-lroa")
    assert "recipe" in (caught.value.expected or "")


def test_plain_values_are_told_by_their_key() -> None:
    with pytest.raises(UserError) as caught:
        parse_config({"training": {"learnin_rate": 1}})
    assert caught.value.where == "training.learnin_rate"


def test_a_config_cannot_be_changed_in_place() -> None:
    config = load_config()
    with pytest.raises(ValueError, match="frozen"):
        config.training.seed = 3  # type: ignore[misc]


def test_a_section_with_nothing_in_it_has_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("training:\n  # learning_rate: 1e-4\nname: null\n", encoding="utf-8")
    assert load_config(file) == Config()

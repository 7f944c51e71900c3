"""The form of a new run without a browser: its controls, its questions, its draft, and the YAML that a job gets."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tuneloom.config import dump_config, load_config, parse_config
from tuneloom.config.recipes import find_recipe, recipe_names
from tuneloom.config.schema import Config, SourceConfig
from tuneloom.errors import UserError
from tuneloom.studio import questions
from tuneloom.studio.drafts import Draft, Drafts, read_text, run_config, safe_name
from tuneloom.studio.forms import check, entered, get, put, settings, shown, source_settings
from tuneloom.studio.jobs import Job, Jobs
from tuneloom.studio.planner import Planner
from tuneloom.studio.reasons import reasons, source_reasons
from tuneloom.studio.settings_zh import SETTINGS_ZH
from tuneloom.studio.speeds import measured_speed
from tuneloom.studio.texts import TEXTS


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a config's values; what a single setting holds stays whole."""
    whole = {"data.variables", "training.lr_scheduler_kwargs"}
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in whole:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def test_every_setting_of_the_declaration_has_a_control_with_its_help_in_both_languages() -> None:
    controls = {setting.key: setting for setting in settings()}
    assert list(controls) == list(flat(Config().model_dump(mode="json")))
    assert {setting.name for setting in source_settings("data.train[0]")} == set(SourceConfig.model_fields)
    assert all(setting.description for setting in (*controls.values(), *source_settings("x")))
    assert set(SETTINGS_ZH) == {*controls, *SourceConfig.model_fields}
    kinds = {key: setting.kind for key, setting in controls.items()}
    expected = {
        "training.learning_rate": "scalar",
        "training.eval_steps": "scalar",
        "adapter.use_dora": "switch",
        "adapter.init_lora_weights": "choice",
        "adapter.target_modules": "words",
        "data.overflow": "choice",
        "data.train": "sources",
        "data.validation": "held",
        "data.variables": "map",
        "evaluation.prompts": "lines",
        "name": "text",
    }
    assert {key: kinds[key] for key in expected} == expected


@pytest.mark.parametrize("recipe", [None, *recipe_names()])
def test_what_a_control_shows_is_what_it_gives_back(recipe: str | None) -> None:
    values = load_config(find_recipe(recipe) if recipe else None).model_dump(mode="json")
    values["training"] |= {"eval_steps": "epoch", "lr_scheduler_kwargs": {"num_cycles": 2, "min_lr": 1e-5}, "save_steps": 7}
    values["adapter"]["target_modules"] = ["q_proj", "v_proj"]
    for setting in settings():
        value = get(values, setting.key)
        if setting.kind in ("switch", "choice", "sources"):
            assert value in setting.choices or setting.kind == "sources"
        else:
            assert entered(setting, shown(setting, value)) == value, setting.key


def test_each_mistake_is_told_by_the_config_loader_at_its_own_key() -> None:
    values = questions.new_values()
    for key, text in {
        "training.learning_rate": "fast",
        "adapter.r": "0",
        "data.train[0].weight": "-1",
        "data.variables": "x",
    }.items():
        control = next(s for s in (*settings(), *source_settings("data.train[0]")) if s.key == key)
        put(values, key, entered(control, text))
    put(values, "training.load_best_model_at_end", True)
    config, mistakes = check(values)
    assert config is None
    assert set(mistakes) == {
        "training.learning_rate",
        "adapter.r",
        "data.train[0].weight",
        "data.variables",
        "training.load_best_model_at_end",
    }
    with pytest.raises(UserError) as told:
        parse_config({"adapter": {"r": 0}})
    assert mistakes["adapter.r"].message() == told.value.message()


def test_a_new_form_is_the_persona_recipe_without_a_name() -> None:
    values = questions.new_values()
    assert "name" not in values["data"]["variables"] and questions.needs_name(values)
    questions.set_variable(values, "name", "Loomi")
    assert parse_config(values) == load_config(find_recipe("persona-lora"))
    assert (questions.method(values), questions.effort(values)) == ("lora", "normal")


@pytest.mark.parametrize("method", questions.METHODS)
def test_a_method_is_that_of_its_recipe_and_back(method: questions.Method) -> None:
    values = questions.new_values()
    questions.set_method(values, method)
    recipe = load_config(find_recipe(f"persona-{method}"))
    assert parse_config(values).adapter == recipe.adapter and questions.method(values) == method
    values["adapter"]["r"] = 3
    questions.set_method(values, "lora")
    assert get(values, "adapter.r") == 3


def test_effort_follows_the_data_and_own_settings_are_of_no_effort() -> None:
    values = questions.new_values()
    questions.add_path(values, "mine.jsonl")
    assert questions.effort(values) == "normal" and get(values, "training.max_steps") == -1
    assert questions.own_paths(values) == ["mine.jsonl"]
    questions.choose_set(values, "counselling", True)
    questions.remove_path(values, "mine.jsonl")
    questions.choose_set(values, "counselling", False)
    assert get(values, "training.max_steps") == 62 and questions.sources(values) == questions.new_values()["data"]["train"]
    for name in questions.EFFORTS:
        questions.set_effort(values, name)
        assert questions.effort(values) == name and check(values)[0] is not None
    put(values, "training.max_steps", 5)
    assert questions.effort(values) is None


def test_presets_keep_name_and_author() -> None:
    values = questions.new_values()
    questions.set_variable(values, "name", "小织")
    for name in questions.PRESETS:
        chosen = questions.preset(name, values)
        assert check(chosen)[0] is not None and questions.variable(chosen, "name") == "小织"
    base_case = load_config(find_recipe("chatglm3-base-case"), ["data.variables={name: 小织, author: Tuneloom}"])
    assert parse_config(questions.preset("base_case", values)) == base_case
    assert questions.effort(questions.preset("careful", values)) == "careful"


def test_every_reason_is_a_text_and_names_what_overrules() -> None:
    values = questions.new_values()
    found = reasons(values)
    assert found["training.num_train_epochs"] == ("new.why_decides", {"setting": "training.max_steps", "value": "62"})
    assert "generation.temperature" in found and "output_dir" in found
    put(values, "training.max_steps", -1)
    put(values, "generation.do_sample", True)
    assert not {"training.num_train_epochs", "generation.temperature"} & set(reasons(values))
    of_source = source_reasons({"path": "self_cognition", "count": 3}, "data.train[0]")
    assert set(of_source) == {f"data.train[0].{name}" for name in ("share", "weight", "subset", "split", "revision")}
    for key, filled in (*found.values(), *of_source.values()):
        assert all(text.format(**filled) for text in TEXTS[key])


def test_a_draft_outlives_the_page_and_a_torn_one_begins_anew(tmp_path: Path) -> None:
    drafts = Drafts(tmp_path)
    draft = drafts.load()
    draft.values["training"]["learning_rate"] = "typed wrong"
    before = drafts.stamp()
    drafts.save(draft)
    assert Drafts(tmp_path).load() == draft and drafts.stamp() != before
    (drafts.folder / "draft.json").write_text('{"key": 3', encoding="utf-8")
    assert drafts.load().values == questions.new_values()


def test_a_yaml_comes_back_as_it_was_and_the_other_dialect_is_taken(tmp_path: Path) -> None:
    config = parse_config(questions.preset("careful", questions.new_values()))
    assert parse_config(read_text(dump_config(config))) == config
    demo = "data_config: {train_file: a.jsonl}\npeft_config: {peft_type: LORA, r: 4}\ntraining_args: {max_steps: 7}\n"
    taken = read_text(demo)
    assert (get(taken, "adapter.r"), get(taken, "training.max_steps")) == (4, 7)
    with pytest.raises(UserError) as told:
        read_text("training:\n  learning_rat: 1\n")
    assert told.value.where == "pasted.yaml:2 training.learning_rat"


def test_the_yaml_that_is_shown_is_what_the_job_gets_and_one_wish_is_one_job(tmp_path: Path) -> None:
    (tmp_path / "loomi-lora").mkdir()
    drafts, jobs = Drafts(tmp_path), Jobs(tmp_path)
    draft = Draft(drafts.load().key, questions.new_values())
    questions.set_variable(draft.values, "name", "Loomi")
    put(draft.values, "base_model.path", "no-such-model")
    shown_yaml = dump_config(run_config(draft.values, tmp_path, {"loomi-lora"}))
    jobs_made = [drafts.start(jobs, draft), drafts.start(jobs, draft)]
    try:
        assert jobs_made[0].id == jobs_made[1].id == draft.key and len(jobs.all()) == 1
        verb, file = jobs_made[0].arguments
        assert verb == "finetune" and Path(file).read_text(encoding="utf-8") == shown_yaml
        assert jobs_made[0].about["run"] == load_config(file).name == "loomi-lora-2"
        after = drafts.load()
        assert after.key != draft.key and after.values == draft.values
    finally:
        jobs.stop(jobs_made[0])
        end(jobs_made[0])


def end(job: Job) -> None:
    deadline = time.monotonic() + 30
    while job.ended() == "running" and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_job_is_not_started_with_a_wrong_value(tmp_path: Path) -> None:
    drafts, jobs = Drafts(tmp_path), Jobs(tmp_path)
    draft = drafts.load()
    put(draft.values, "adapter.r", "many")
    with pytest.raises(UserError, match=r"adapter\.r"):
        drafts.start(jobs, draft)
    assert jobs.all() == []


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("../../etc/passwd.json", "passwd.json"),
        ("C:\\data\\我的 数据.csv", "我的_数据.csv"),
        (".jsonl", "jsonl"),
        ("a\x00b<script>.txt", "a_b_script_.txt"),
        ("..", "data"),
        ("x" * 300 + ".json", "x" * 60 + ".json"),
    ],
)
def test_uploads_stay_in_a_folder_of_their_own_under_a_safe_name(tmp_path: Path, name: str, safe: str) -> None:
    assert safe_name(name) == safe
    drafts = Drafts(tmp_path)
    if "." not in safe:
        with pytest.raises(UserError, match="kind of data file"):
            drafts.upload_place(name)
    else:
        place = drafts.upload_place(name)
        assert place.parent.parent == drafts.uploads and place.name == safe and not place.exists()
        assert place != drafts.upload_place(name)


def test_the_newest_alike_run_gives_the_speed(finished_run: Path) -> None:
    runs, plan = finished_run.parent, json.loads((finished_run / "plan.json").read_text(encoding="utf-8"))
    start = json.loads((finished_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    found = measured_speed(runs, start["base_model"], "lora", plan["device"])
    assert found is not None and found.run == finished_run.name and found.tokens_per_second > 0
    assert measured_speed(runs, start["base_model"], "dora", plan["device"]) is None
    assert measured_speed(runs, start["base_model"], "lora", "another device") is None
    assert measured_speed(runs / "missing", "x", "lora", "cpu") is None


def test_the_planner_counts_as_the_trainer_does(finished_run: Path, rows_file: Path, tmp_path: Path) -> None:
    config = load_config(finished_run / "config.yaml").model_dump(mode="json")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows_file.read_text(encoding="utf-8") + '{"messages": 3}\n', encoding="utf-8")
    planner = Planner()

    def asked(do: str, path: str = "", **changes: Any) -> dict[str, Any]:
        request = {"do": do, "config": {**config, **changes}, "path": path, "runs": str(finished_run.parent)}
        return json.loads(json.dumps(planner.answer(request, lambda _: None)))

    plan = asked("plan")["plan"]
    events = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = next(event for event in events if event["event"] == "end")
    assert (plan["steps"], plan["tokens"]) == (trained["step"], trained["tokens"])
    assert plan["seconds"] == pytest.approx(trained["tokens"] / trained["tokens_per_second"])
    assert asked("plan", adapter={**config["adapter"], "use_dora": True})["plan"]["seconds"] is None
    checked = asked("check", str(bad))["check"]
    [problem] = checked["problems"]
    assert (checked["dropped"], problem["line"]) == (1, len(bad.read_text(encoding="utf-8").splitlines()))
    assert checked["rows"][0][0]["role"] == "user"
    mistake = asked("plan", data={**config["data"], "train": [{"path": str(tmp_path / "none.jsonl")}]})
    assert (mistake["key"], mistake["error"]["what"]) == ("data.train", "data not found")
    unnamed = asked("plan", data={**config["data"], "train": [{"path": "self_cognition"}], "variables": {}})
    assert unnamed["key"].startswith("data.variables.")
    assert asked("plan", base_model={"path": "nobody/nothing"}) == {"absent": "nobody/nothing"}
    assert asked("plan", base_model={"path": "nothing"})["key"] == "base_model.path"


def test_what_the_page_is_made_of_brings_no_torch() -> None:
    modules = "drafts, forms, questions, reasons, planning, speeds, planner"
    code = f"import sys; from tuneloom.studio import {modules}; import tuneloom.models.embedded; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

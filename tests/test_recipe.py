"""Recipes: strict names, overrides, number forms, equivalents of other trainers' names, contradictions, round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from finesight.cli.reference import settings_reference
from finesight.errors import RecipeError
from finesight.recipe import Recipe, Settings
from finesight.recipe_files import all_setting_names, dump_recipe, load_recipe, parse_recipe, section_class

MINIMAL = "model:\n  name_or_path: some/model\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def refused(content: dict, *words: str) -> str:
    """The message with which a recipe is refused; it must hold all the words."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(content)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def with_model(**sections: dict) -> dict:
    return {"model": {"name_or_path": "some/model"}, **sections}


class TestNames:
    def test_a_misspelt_setting_is_answered_with_the_nearest(self) -> None:
        refused(with_model(training={"learning_rat": 1e-4}), "training.learning_rat: unknown setting; did you mean 'learning_rate'?")

    def test_a_misspelt_section_is_answered_with_the_nearest(self) -> None:
        refused(with_model(trainig={}), "trainig: unknown setting; did you mean 'training'?")

    def test_a_setting_in_the_wrong_section_is_answered_with_the_right_one(self) -> None:
        refused(with_model(training={"max_pixels": 1000}), "training.max_pixels", "did you mean 'data.max_pixels'?")

    def test_inside_a_list_the_entry_is_named(self) -> None:
        refused(with_model(data={"train": [{"path": "a.json"}, {"path": "b.json", "colums": {}}]}), "data.train.1.colums", "'columns'")

    def test_far_from_everything_the_known_names_are_listed(self) -> None:
        refused(with_model(evaluation={"zzzzqqqq": 1}), "evaluation.zzzzqqqq: unknown setting; known here: tasks, text_probe")

    def test_all_problems_come_at_once(self) -> None:
        message = refused(with_model(training={"learning_rat": 1, "train_batch_size": 0}, tuning={"r": "many"}))
        assert "3 setting(s)" in message
        assert "tuning.r" in message and "'many'" in message

    def test_the_model_must_be_named(self) -> None:
        refused({}, "model: must be given")

    def test_settings_are_frozen(self) -> None:
        recipe = parse_recipe(with_model())
        with pytest.raises(ValidationError):
            recipe.training.learning_rate = 1.0  # type: ignore[misc]


class TestFile:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="finesight init"):
            load_recipe(tmp_path / "none.yaml")

    def test_not_yaml(self, tmp_path: Path) -> None:
        (tmp_path / "bad.yaml").write_text("model: [", encoding="utf-8")
        with pytest.raises(RecipeError, match="not valid YAML"):
            load_recipe(tmp_path / "bad.yaml")

    def test_not_sections(self, tmp_path: Path) -> None:
        (tmp_path / "list.yaml").write_text("- a\n- b\n", encoding="utf-8")
        with pytest.raises(RecipeError, match="must hold sections"):
            load_recipe(tmp_path / "list.yaml")

    def test_the_file_is_named_in_the_message(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text(MINIMAL + "tuning:\n  rank: 8\n", encoding="utf-8")
        with pytest.raises(RecipeError, match=r"mine\.yaml"):
            load_recipe(path)

    def test_rows_beside_a_recipe_in_another_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What lies in the present folder goes first, as ever; names of the hub stay names."""
        (tmp_path / "own" / "images").mkdir(parents=True)
        (tmp_path / "here").mkdir()
        for file in ("own/rows.jsonl", "own/both.jsonl", "own/held.jsonl", "here/both.jsonl"):
            (tmp_path / file).touch()
        sources = "[{path: rows.jsonl, media_dir: images}, both.jsonl, someone/charts]"
        (tmp_path / "own" / "recipe.yaml").write_text(f"{MINIMAL}data: {{train: {sources}, eval_split: held.jsonl}}\n", encoding="utf-8")
        monkeypatch.chdir(tmp_path / "here")
        data = load_recipe("../own/recipe.yaml").data
        assert [source.path for source in data.train] == ["../own/rows.jsonl", "both.jsonl", "someone/charts"]
        assert [source.media_dir for source in data.train] == ["../own/images", None, None] and data.eval_split == "../own/held.jsonl"
        assert load_recipe("../own/recipe.yaml", ["data.eval_split=5%"]).data.eval_split == "5%"
        monkeypatch.chdir(tmp_path / "own")
        assert load_recipe("recipe.yaml").data.eval_split == "held.jsonl"


class TestOverrides:
    def test_dotted_names_replace_and_add(self, minimal: Path) -> None:
        recipe = load_recipe(minimal, ["training.learning_rate=2e-5", "tuning.r=8", "data.image_first=true", "training.output_dir=runs/x"])
        assert recipe.training.learning_rate == 2e-5
        assert recipe.tuning.r == 8
        assert recipe.data.image_first is True
        assert recipe.training.output_dir == "runs/x"

    def test_lists_and_their_entries(self, minimal: Path) -> None:
        recipe = load_recipe(
            minimal, ["data.train=[{path: a.json}, {path: b.json}]", "data.train.1.path=c.json", "training.report_to=tensorboard"]
        )
        assert [source.path for source in recipe.data.train] == ["a.json", "c.json"]
        assert recipe.training.report_to == ["tensorboard"]

    @pytest.mark.parametrize("train", ["a.json", "{path: a.json}", "[a.json]"])
    def test_short_forms_are_opened(self, minimal: Path, train: str) -> None:
        minimal.write_text(MINIMAL + f"data: {{train: {train}}}\ngrpo: {{}}\nrewards: [math, exact_match]\n", encoding="utf-8")
        recipe = load_recipe(minimal, ["data.train.0.system=Be brief.", "data.train.0.path=b.json", "rewards.1.weight=2"])
        assert [(source.path, source.system) for source in recipe.data.train] == [("b.json", "Be brief.")]
        assert [(reward.name, reward.weight) for reward in recipe.rewards] == [("math", 1), ("exact_match", 2)]
        assert load_recipe(minimal, ["rewards=math", "rewards.weight=3"]).rewards[0].weight == 3

    def test_null(self, minimal: Path) -> None:
        assert load_recipe(minimal, ["evaluation.text_probe=null"]).evaluation.text_probe is None

    @pytest.mark.parametrize("override", ["training.learning_rate", "=3", "training.learning_rate.x=1", "data.train.4.path=x"])
    def test_what_cannot_be_applied_is_refused(self, minimal: Path, override: str) -> None:
        minimal.write_text(MINIMAL + "training: {learning_rate: 0.1}\ndata: {train: [{path: a.json}]}\n", encoding="utf-8")
        with pytest.raises(RecipeError, match="Override"):
            load_recipe(minimal, [override])

    def test_unknown_names_are_refused_as_in_the_file(self, minimal: Path) -> None:
        with pytest.raises(RecipeError, match="did you mean 'learning_rate'"):
            load_recipe(minimal, ["training.learning_rte=1"])


class TestNumbers:
    @pytest.mark.parametrize("text", ["2e-5", "2E-5", "2.0e-5", "0.00002", ".2e-4"])
    def test_forms_of_a_small_number(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(MINIMAL + f"training:\n  learning_rate: {text}\n", encoding="utf-8")
        assert load_recipe(path).training.learning_rate == pytest.approx(2e-5)

    def test_words_that_look_a_little_like_numbers_stay_words(self) -> None:
        recipe = parse_recipe({"model": {"name_or_path": "2e"}, "training": {"output_dir": "1e-run"}})
        assert (recipe.model.name_or_path, recipe.training.output_dir) == ("2e", "1e-run")

    def test_limits(self) -> None:
        refused(with_model(training={"learning_rate": -1.0}), "training.learning_rate")
        refused(with_model(tuning={"lora_dropout": 1.0}), "tuning.lora_dropout")


class TestEquivalents:
    def test_batch_and_accumulation(self) -> None:
        message = refused(
            with_model(training={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
            "your batch of 2 × 4 is `train_batch_size: 8`",
        )
        assert "remove per_device_train_batch_size and gradient_accumulation_steps" in message

    def test_accumulation_alone(self) -> None:
        refused(with_model(training={"gradient_accumulation_steps": 4}), "`train_batch_size: 4`")

    def test_one_path_stands_for_a_list_of_sources(self) -> None:
        for given in ("a.json", {"path": "a.json"}, ["a.json"], [{"path": "a.json"}]):
            assert [source.path for source in parse_recipe(with_model(data={"train": given})).data.train] == ["a.json"]

    def test_a_task_may_name_its_file_directly(self) -> None:
        recipe = parse_recipe(with_model(evaluation={"tasks": [{"name": "t", "data": "test.jsonl"}, {"name": "h"}]}))
        assert recipe.evaluation.tasks[0].data.path == "test.jsonl"  # type: ignore[union-attr]
        assert recipe.evaluation.tasks[1].data == "eval_split"

    def test_no_tracker(self) -> None:
        for given in (None, "none", []):
            assert parse_recipe(with_model(training={"report_to": given})).training.report_to == []


class TestYaml:
    def test_a_section_whose_settings_are_all_commented_out(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(MINIMAL + "tuning:\n  # r: 8\ntraining:\n", encoding="utf-8")
        assert load_recipe(path) == parse_recipe(with_model())

    def test_a_bare_no_is_the_word(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(MINIMAL + "training:\n  save_strategy: no\n  eval_strategy: no\n", encoding="utf-8")
        assert load_recipe(path).training.save_strategy == "no"


class TestContradictions:
    @pytest.mark.parametrize(
        ("sections", "words"),
        [
            ({"data": {"min_pixels": 200, "max_pixels": 100}}, ["data.min_pixels (200)", "data.max_pixels (100)"]),
            ({"data": {"share_prefixes": True}, "tuning": {"lora_dropout": 0.1}}, ["share_prefixes", "lora_dropout"]),
            ({"training": {"eval_strategy": "steps"}}, ["training.eval_strategy", "data.eval_split"]),
            ({"training": {"early_stopping_patience": 2}, "data": {"eval_split": "5%"}}, ["early stopping", "eval_strategy"]),
            ({"training": {"optim": "muon"}}, ["muon", "full tuning"]),
            ({"tuning": {"finetune_language_layers": False}}, ["nothing trains"]),
            ({"tuning": {"finetune_experts": True, "lora_dropout": 0.1}}, ["finetune_experts", "lora_dropout"]),
            (
                {"tuning": {"finetune_experts": True, "finetune_language_layers": False, "finetune_merger": True}},
                ["finetune_language_layers: true"],
            ),
            ({"model": {"name_or_path": "m", "adapter": "a"}, "tuning": {"method": "full"}}, ["model.adapter", "lora"]),
            ({"data": {"eval_split": "lots%"}}, ["data.eval_split", "'lots%'"]),
            ({"data": {"eval_split": "100%"}}, ["data.eval_split"]),
            ({"data": {"eval_split": "last 0"}}, ["data.eval_split", "last 4"]),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_refused(self, sections: dict, words: list[str]) -> None:
        refused({**with_model(), **sections}, *words)

    def test_dropout_switches_sharing_off_by_itself(self) -> None:
        assert parse_recipe(with_model()).shares_prefixes
        assert not parse_recipe(with_model(tuning={"lora_dropout": 0.1})).shares_prefixes
        assert not parse_recipe(with_model(data={"share_prefixes": False})).shares_prefixes


class TestWholeRecipe:
    def test_round_trip(self, tmp_path: Path) -> None:
        recipe = parse_recipe(
            with_model(
                data={"train": ["a.json", {"path": "b.parquet", "columns": {"image": "image", "answer": "label"}}], "eval_split": "5%"},
                training={"learning_rate": 2e-5, "report_to": "tensorboard", "max_steps": 7},
                evaluation={"tasks": [{"name": "问答", "data": {"path": "测试.jsonl"}}]},
            )
        )
        path = tmp_path / "recipe.yaml"
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(path) == recipe
        assert "问答" in path.read_text(encoding="utf-8")

    def test_code_beside_a_recipe_is_named_from_the_present_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also in what a run saves of it elsewhere; what is not beside it, and modules, keep their names."""
        monkeypatch.chdir(tmp_path)
        for folder in ("recipes/sub", "runs"):
            Path(folder).mkdir(parents=True)
        Path("recipes/own.py").touch()
        Path("recipes/sub/grade.py").touch()
        absolute = f"{tmp_path}/recipes/own.py:f"
        names = ["own.py:f", "./own.py", "sub/grade.py:g", "gone.py:f", "recipes.own:f", "math", absolute]
        rewards = [{"name": name, "weight": 0.5} for name in names]
        content = with_model(grpo={}, rewards=rewards, evaluation={"tasks": [{"name": "t", "grader": "sub/grade.py"}]})
        path = Path("recipes/r.yaml")
        path.write_text(dump_recipe(parse_recipe(content)), encoding="utf-8")
        recipe = load_recipe(path)
        found = ["recipes/own.py:f", "recipes/own.py", "recipes/sub/grade.py:g", "gone.py:f", "recipes.own:f", "math", absolute]
        assert [reward.name for reward in recipe.rewards] == found and {reward.weight for reward in recipe.rewards} == {0.5}
        assert recipe.evaluation.tasks[0].grader == "recipes/sub/grade.py"
        saved = Path("runs/recipe.yaml")
        saved.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(saved) == recipe
        monkeypatch.chdir("recipes")
        assert [reward.name for reward in load_recipe("r.yaml").rewards] == names

    def test_every_setting_is_described_in_one_sentence(self) -> None:
        bare = []
        sections: list[type[Settings]] = [Recipe]
        for section in sections:
            for name, info in section.model_fields.items():
                inner = section_class(info.annotation)
                if inner is not None:
                    sections.append(inner)
                if section is not Recipe and not (info.description and info.description.endswith((".", "'"))):
                    bare.append(f"{section.__name__}.{name}")
        assert not bare

    def test_the_reference_is_the_one_of_these_settings(self) -> None:
        reference = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
        assert reference.read_text(encoding="utf-8") == settings_reference(), "renew it with: make docs"

    def test_names_of_settings_are_unique_enough_to_be_found(self) -> None:
        names = all_setting_names()
        assert len(names) == len(set(names))
        assert {"training.learning_rate", "data.train.columns.image", "evaluation.tasks.grader"} <= set(names)


@pytest.mark.parametrize(
    ("section", "name", "expected"),
    [
        ("tuning", "lora_rank", "tuning.r"),
        ("data", "image_max_pixels", "data.max_pixels"),
        ("model", "adapter_name_or_path", "model.adapter"),
        ("data", "cutoff_len", "data.max_length_tokens"),
        ("training", "lr", "training.learning_rate"),
        ("training", "bf16", "model.dtype"),
        ("model", "quantization_bit", "load_in_4bit"),
    ],
)
def test_names_of_other_trainers_get_the_right_one(section, name, expected):
    with pytest.raises(RecipeError, match=expected.replace(".", r"\.")):
        load_recipe(None, ["model.name_or_path=x", f"{section}.{name}=1"])


def test_batch_names_are_answered_wherever_they_stand():
    with pytest.raises(RecipeError, match="train_batch_size: 8"):
        load_recipe(None, ["model.name_or_path=x", "per_device_train_batch_size=2", "gradient_accumulation_steps=4"])


@pytest.mark.parametrize(("text", "said"), [("5", "'5%' or 'last 5'"), ("0.05", "'5%'")])
def test_a_bare_number_is_no_hold_out(text, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(None, ["model.name_or_path=x", f"data.eval_split={text}"])


def test_no_hold_out_can_be_said_in_words():
    assert load_recipe(None, ["model.name_or_path=x", "data.eval_split=none"]).data.eval_split is None

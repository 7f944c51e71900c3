"""The three commands of `finetune_demo` as the README has them, whole: train, ask, export."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from test_readme import commands, run_in


@pytest.mark.real
def test_the_three_commands_run_whole_and_the_model_says_its_name(tmp_path: Path) -> None:
    three = [words for words in commands("README.md") if words[0] == "python3"]
    assert [words[1] for words in three] == ["finetune_hf.py", "inference_hf.py", "model_export_hf.py"]
    for words in three:
        assert run_in(words, tmp_path)
    assert "Loomi" in run_in([*shlex.split("python3 inference_hf.py output/checkpoint-40/ --prompt"), "Who are you?"], tmp_path)
    assert (tmp_path / "output" / "test_results.json").is_file()
